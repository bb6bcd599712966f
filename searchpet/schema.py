"""What the columns of a task mean: fields, label, classes, type, metrics; declared or inferred.

A declaration is `meta.json` (other keys of it are left alone) or `task.toml` (checked strictly;
it wins key by key).  What neither says is inferred from the training rows.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from searchpet.errors import InputError
from searchpet.metrics import check_metrics, parse_metrics
from searchpet.rows import Table

Type = Literal["classification", "regression"]
TYPES: dict[str, Type] = {
    "single": "classification", "pair": "classification", "classification": "classification",
    "regression": "regression",
}
PAIRS = (
    ("text1", "text2"), ("sentence1", "sentence2"), ("premise", "hypothesis"),
    ("question1", "question2"), ("question", "sentence"), ("question", "passage"),
    ("text_a", "text_b"),
)
SINGLES = ("text", "sentence", "question", "query", "utterance", "content", "review")
LABELS = ("label", "labels", "target", "score", "class", "category", "coarse_label")


class Recipe(BaseModel):
    """What a user declares of a task; None is inferred."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str | None = None
    fields: tuple[str, ...] | None = None
    label: str | None = None
    labels: tuple[str, ...] | None = None
    type: str | None = None
    metrics: tuple[str, ...] | None = None

    @field_validator("fields", mode="before")
    @classmethod
    def _one_field(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("fields")
    @classmethod
    def _one_or_two(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and len(value) not in (1, 2):
            raise ValueError(f"must name 1 or 2 columns, but got {len(value)}")
        return value

    @field_validator("labels")
    @classmethod
    def _distinct(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and (len(value) < 2 or len(set(value)) < len(value)):
            raise ValueError(f"must be at least 2 different names, but got {list(value)}")
        return value

    @field_validator("metrics", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


@dataclass(frozen=True)
class Schema:
    """The meaning of a task's columns.  ids: a label as written -> its class number."""

    type: Type
    fields: tuple[str, ...]
    label: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    ids: Mapping[str, int]


def read_recipe(folder: Path) -> Recipe:
    """The declarations in a folder.  Raises InputError naming file, key and value."""
    declared: dict[str, Any] = {}
    meta, toml = folder / "meta.json", folder / "task.toml"
    if meta.is_file():
        known = {k: v for k, v in _parsed(meta, json.loads).items() if v is not None}
        known.setdefault("type", known.get("task"))
        keep = (*Recipe.model_fields, "metric")
        declared = recipe({k: known[k] for k in keep if known.get(k) is not None},
                          str(meta)).model_dump(exclude_none=True)
    if toml.is_file():
        declared |= recipe(_parsed(toml, tomllib.loads), str(toml)).model_dump(exclude_none=True)
    return Recipe(**declared)


def recipe(declared: Mapping[str, Any], source: str) -> Recipe:
    """A checked declaration; `metric` is another word for `metrics`.

    Raises InputError naming the source, the key, the value and what is allowed.
    """
    values = dict(declared)
    if "metric" in values:
        values.setdefault("metrics", values.pop("metric"))
    if str(values.get("type", "single")) not in TYPES:
        raise _unsupported(str(values["type"]), source)
    try:
        found = Recipe(**values)
        metrics = parse_metrics(" ".join(found.metrics)) if found.metrics is not None else None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{source}: key {key!r}: {first['msg']}, but got {first['input']!r}; keys are "
            f"{', '.join(Recipe.model_fields)}"
        ) from None
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    return found.model_copy(update={"metrics": metrics})


def _unsupported(found: str, source: str) -> InputError:
    return InputError(
        f"task type must be one of {', '.join(TYPES)}, but {source} says {found!r}; token "
        "classification, generation and vision are not supported for now"
    )


def _parsed(path: Path, parse: Any) -> dict[str, Any]:
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{path} must be valid {path.suffix[1:]}, but: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} must hold an object, but holds a {type(found).__name__}")
    return found


def resolve(declared: Recipe, train: Table) -> Schema:
    """Fill in from the training rows what is not declared.  Raises InputError."""
    for name, value in train.rows[0].items():
        if name in ("tokens", "words") and isinstance(value, list):
            raise _unsupported("token", f"column {name!r} of {train.source}")
    for name in declared.fields or ():
        train.column(name)
    label = declared.label or _label_column(train, declared.fields or ())
    fields = declared.fields or _text_columns(train, label)
    if declared.type == "pair" and len(fields) != 2:
        raise InputError(f"a task of type 'pair' must have 2 text columns, but {train.source} has "
                         f"{fields[0]!r} only; name both in fields")
    values = train.column(label)
    if declared.type is None and declared.labels is None:
        kind: Type = "regression" if _is_real(values) else "classification"
    else:
        kind = TYPES[declared.type or "classification"]
    if kind == "regression":
        names: tuple[str, ...] = ()
        metrics = declared.metrics or ("spearman", "pearson")
    else:
        names = declared.labels or _class_names(values, train, label)
        metrics = declared.metrics or ("accuracy",)
    ids = {name: i for i, name in enumerate(names)}
    if declared.labels and not all(name.lstrip("-").isdigit() for name in names):
        ids = {str(i): i for i in range(len(names))} | ids  # a number is a class id
    check_metrics(metrics, len(names))
    return Schema(kind, fields, label, names, metrics, ids)


def targets(schema: Schema, table: Table) -> tuple[int, ...] | tuple[float, ...] | None:
    """Labels of a split: class ids or finite floats; None where the split has none.

    A split has none when the column lacks or holds only nulls or -1.  Raises InputError naming
    file, line, column and value for a label that is no class, or no finite number.
    """
    if schema.label not in table.columns:
        return None
    values = table.column(schema.label)
    hides = schema.type == "classification" and "-1" not in schema.ids  # -1 can mean hidden
    if all(value is None or (hides and number(value) == -1) for value in values):
        return None
    if schema.type == "regression":
        return tuple(_real(schema, table, i, value) for i, value in enumerate(values))
    return tuple(_class_id(schema, table, i, value) for i, value in enumerate(values))


def number(value: Any) -> int | float | None:
    """The number in a cell, whole ones as int; None for what is no number."""
    if isinstance(value, bool | int):
        return int(value)
    if not isinstance(value, str | float):
        return None
    try:
        found = float(value)
    except ValueError:
        return None
    return int(found) if found.is_integer() else found


def _is_real(values: list[Any]) -> bool:
    """All numbers, and some not whole (nan and inf are not whole)."""
    found = [number(value) for value in values]
    return None not in found and any(isinstance(n, float) for n in found)


def _real(schema: Schema, table: Table, row: int, value: Any) -> float:
    found = number(value)
    if found is None or not math.isfinite(found):
        raise InputError(f"a regression target must be a finite number, but {table.where(row)}, "
                         f"column {schema.label!r}, has {value!r}; correct or remove the row")
    return float(found)


def _class_id(schema: Schema, table: Table, row: int, value: Any) -> int:
    for key in (str(value), str(number(value))):
        if value is not None and key in schema.ids:
            return schema.ids[key]
    names = ", ".join(schema.labels[:8]) + (", ..." if len(schema.labels) > 8 else "")
    raise InputError(
        f"a label must be one of the {len(schema.labels)} classes ({names}) or its number from "
        f"0, but {table.where(row)}, column {schema.label!r}, has {value!r}; correct the row, or "
        "name all classes in labels"
    )


def _class_names(values: list[Any], train: Table, label: str) -> tuple[str, ...]:
    """Different labels of the training rows, in order of their numbers or letters."""
    numbers = [number(value) for value in values]
    if all(isinstance(n, int) for n in numbers):
        names = tuple(str(n) for n in sorted({n for n in numbers if n is not None}))
    elif all(isinstance(value, str) for value in values):
        names = tuple(sorted(set(values)))
    else:
        i = next(i for i, v in enumerate(values) if not isinstance(v, str | int))
        raise InputError(f"labels must all be class names or all whole numbers, but "
                         f"{train.where(i)}, column {label!r}, has {values[i]!r}; correct the row")
    if len(names) < 2 or len(names) > max(20, len(values) // 2):
        raise InputError(
            f"classes must be at least 2 and come back in several rows, but column {label!r} of "
            f"{train.source} holds {len(names)} different value(s) in {len(values)} rows; name "
            "the right column as label, or type = \"regression\" for numbers"
        )
    return names


def _label_column(train: Table, fields: tuple[str, ...]) -> str:
    rest = [name for name in train.columns if name not in fields]
    named = [name for name in LABELS if name in rest]
    others = [name for name in rest if not isinstance(train.rows[0].get(name), str)]
    if named or len(others) == 1:
        return (named or others)[0]
    raise InputError(
        f"a label column must be called {', '.join(LABELS)}, but {train.source} has the columns "
        f"{', '.join(map(repr, train.columns))}; rename one, or name it as label in task.toml"
    )


def _text_columns(train: Table, label: str) -> tuple[str, ...]:
    texts = [name for name, value in train.rows[0].items()
             if isinstance(value, str) and name != label]
    for pair in PAIRS:
        if set(pair) <= set(texts):
            return pair
    for single in SINGLES:
        if single in texts:
            return (single,)
    if len(texts) in (1, 2):
        return tuple(texts)
    raise InputError(
        f"text must be in a column called {SINGLES[0]!r}, in {PAIRS[0]}, or in the only one or "
        f"two columns of strings, but {train.source} has {', '.join(map(repr, train.columns))}, "
        f"of which {len(texts)} hold strings; name the fields in task.toml"
    )

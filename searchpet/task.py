"""A task is data: texts, labels, metrics and splits, whatever they came from.

`load_task` takes the name of an embedded task, a folder, or a data set of the Hugging Face hub.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from searchpet import catalog
from searchpet.errors import InputError, unknown
from searchpet.rows import FORMATS, Table, read_table
from searchpet.schema import Recipe, Schema, read_recipe, recipe, resolve, targets

SPLITS = {  # canonical name -> accepted names, the first found is taken
    "train": ("train",),
    "validation": ("validation", "dev", "valid", "val", "validation_matched"),
    "test": ("test", "test_matched"),
}
CARVED = 0.1  # share of train that becomes validation where there is none
PATIENCE = 5.0  # seconds to reach the hub before it counts as out of reach


@dataclass(frozen=True)
class Split:
    """Rows of a split.  columns: one or two text columns; labels: class ids, floats, or None."""

    columns: tuple[tuple[str, ...], ...]
    labels: tuple[int, ...] | tuple[float, ...] | None

    def __len__(self) -> int:
        return len(self.columns[0])

    @property
    def texts(self) -> list[tuple[str, ...]]:
        """The one or two texts of each row."""
        return list(zip(*self.columns, strict=True))

    def select(self, rows: Sequence[int]) -> Split:
        """The rows at these indices, in that order."""
        columns = tuple(tuple(column[i] for i in rows) for column in self.columns)
        labels = self.labels
        return Split(columns, None if labels is None else tuple(labels[i] for i in rows))


@dataclass(frozen=True)
class Task:
    """A task.  labels: class names, empty for regression; metrics: the first is the score.

    splits: train, validation, and test where there is one; a test split may be without labels.
    fingerprint: sha256 over type, fields, class names and the content of all splits.
    """

    name: str
    type: Literal["classification", "regression"]
    fields: tuple[str, ...]
    label_field: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    splits: Mapping[str, Split]
    fingerprint: str
    warnings: tuple[str, ...]

    @property
    def outputs(self) -> int:
        """Outputs of the head: one per class, or one number."""
        return len(self.labels) or 1


def load_task(name: str, *, data: Path | None = None) -> Task:
    """The task called `name`: embedded, a folder (as given, or under `data`), or of the hub.

    Raises InputError where nothing of that name is found, or its content is wrong.
    """
    if name in catalog.names("tasks"):
        return _from_embedded(name)
    for folder in (Path(name).expanduser(), *([data / name] if data else [])):
        if name and folder.is_dir():
            return _from_folder(folder)
    if not name or name.startswith((".", "/", "~")) or Path(name).exists() or name.count("/") > 2:
        raise InputError(f"task must be {', '.join(catalog.names('tasks'))}, a folder with train."
                         f"{'|'.join(FORMATS)}, or a hub name such as glue/sst2, but got {name!r}")
    return _from_hub(name, data)


def read_texts(path: Path, fields: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Text columns of a CSV, JSON Lines or parquet file; labels are not needed.

    Raises InputError for a missing column, naming those found, and for what cannot be read.
    """
    table = read_table(path)
    return tuple(table.texts(name) for name in fields)


def _from_embedded(name: str) -> Task:
    raw = catalog.get("tasks", name)()
    meta = dict(raw["meta"])
    meta.setdefault("type", meta.get("task"))
    keys = {k: meta[k] for k in (*Recipe.model_fields, "metric") if meta.get(k) is not None}
    tables = {split: Table(f"{name} {split}", raw[split], range(1, len(raw[split]) + 1))
              for split in SPLITS if raw.get(split)}
    return _build(name, tables, recipe(keys, f"task {name!r}"))


def _from_folder(folder: Path) -> Task:
    declared = read_recipe(folder)
    tables = {}
    for split, names in SPLITS.items():
        files = [folder / f"{n}.{form}" for n in names for form in FORMATS]
        found = [file for file in files if file.is_file()]
        if len(found) > 1:
            raise InputError(f"{split} must be one file, but {folder} has "
                             f"{', '.join(file.name for file in found)}; keep one")
        if found:
            tables[split] = read_table(found[0])
    if "train" not in tables:
        raise InputError(f"a task folder must have train.{'|'.join(FORMATS)}, but {folder} has "
                         f"{', '.join(sorted(p.name for p in folder.iterdir())) or 'no file'}")
    return _build(declared.name or folder.resolve().name, tables, declared)


def _build(name: str, tables: dict[str, Table], declared: Recipe) -> Task:
    """Tables to a task: resolve the columns, convert, carve, check, warn."""
    schema = resolve(declared, tables["train"])
    splits = {
        split: Split(tuple(table.texts(f) for f in schema.fields), targets(schema, table))
        for split, table in tables.items()
    }
    for split in ("train", "validation"):
        if split in splits and splits[split].labels is None:
            raise InputError(f"{split} must have labels, but column {schema.label!r} of "
                             f"{tables[split].source} has none; add them")
    warnings = []
    if "validation" not in splits:
        train = splits["train"]
        classes = (train.labels or ()) if schema.labels else (0,) * len(train)
        splits = _carve(splits, classes, tables["train"].source)
        warnings.append(f"no validation split: {len(splits['validation'])} of {len(train)} "
                        "training rows were taken out of training for it")
    elif schema.type == "classification":
        _check_learnable(schema, splits, tables["validation"])
    warnings += _overlaps(splits)
    return Task(name, schema.type, schema.fields, schema.label, schema.labels, schema.metrics,
                splits, _fingerprint(schema, splits), tuple(warnings))


def _check_learnable(schema: Schema, splits: Mapping[str, Split], validation: Table) -> None:
    """Raise InputError for a validation label that no training row has."""
    seen = set(splits["train"].labels or ())
    for i, label in enumerate(splits["validation"].labels or ()):
        if label not in seen:
            raise InputError(
                f"each validation label must be in train, but {validation.where(i)}, column "
                f"{schema.label!r}, has {schema.labels[int(label)]!r}, which no training row has; "
                "add training rows of that class or remove it from validation"
            )


def _carve(
    splits: Mapping[str, Split], classes: Sequence[float], source: str
) -> dict[str, Split]:
    """Take validation out of train: equal texts together, chosen by a hash of the text.

    The hash alone gives the order, so that the choice survives reordering.  No class loses its
    last training row.  Raises InputError where nothing can be taken.
    """
    train = splits["train"]
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, texts in enumerate(train.texts):
        groups.setdefault(texts, []).append(i)
    left = Counter(classes)
    taken: list[int] = []
    for texts in sorted(groups, key=lambda t: hashlib.sha256(json.dumps(t).encode()).digest()):
        gone = Counter(classes[i] for i in groups[texts])
        if len(taken) < CARVED * len(train) and all(left[k] > gone[k] for k in gone):
            left -= gone
            taken += groups[texts]
    if not taken:
        raise InputError(f"{source} must have rows to spare for validation, but taking any of its "
                         f"{len(train)} rows would take a class away; add a validation file")
    rest = sorted(set(range(len(train))) - set(taken))
    return {**splits, "train": train.select(rest), "validation": train.select(sorted(taken))}


def _overlaps(splits: Mapping[str, Split]) -> Iterator[str]:
    """Warnings, with counts, for texts that stand in two splits."""
    for split, other in (("test", "validation"), ("test", "train"), ("validation", "train")):
        if split not in splits:
            continue
        rows, known = splits[split].texts, set(splits[other].texts)
        count = sum(texts in known for texts in rows)
        if split == "test" and sorted(rows) == sorted(splits["validation"].texts):
            if other == "validation":
                yield f"test equals validation: all {count} rows; a test score says nothing new"
        elif count:
            yield f"{count} of {len(rows)} {split} rows have a text that is in {other} too"


def _fingerprint(schema: Schema, splits: Mapping[str, Split]) -> str:
    digest = hashlib.sha256()
    for part in ([schema.type, schema.fields, schema.labels],
                 *([name, splits[name].columns, splits[name].labels] for name in sorted(splits))):
        digest.update(json.dumps(part, ensure_ascii=True, separators=(",", ":")).encode())
    return digest.hexdigest()


def _from_hub(name: str, data: Path | None) -> Task:
    """`name` is data set, data set/configuration, owner/data set, or all three."""
    from datasets import load_dataset

    head, _, tail = name.rpartition("/")
    ways: list[tuple[str, str | None]] = [(head, tail)] if head else []  # glue/sst2: glue's sst2
    ways += [(name, None)] if name.count("/") < 2 else []
    problems = []
    with _hub_reach() as why:
        for path, config in ways:
            try:
                found = load_dataset(path, config)
                break
            except Exception as error:  # the hub's client raises many kinds, even for one cause
                missing = type(error).__name__ == "DatasetNotFoundError"
                problems.append((missing, " ".join(str(error).split())[:300]))
        else:
            raise _not_found(name, data, why, min(problems)[1])
    return _from_dataset(name, found)


def _not_found(name: str, data: Path | None, why: str, problem: str) -> InputError:
    if not why:
        return InputError(f"task {name!r} must be on the hub, but: {problem}; check the name, or "
                          "give a folder")
    folders = [path.name for path in data.iterdir() if path.is_dir()] if data else []
    known = {*catalog.names("tasks"), *folders}
    here = f"{unknown('task', name, known)}; " if "/" not in name else ""
    return InputError(f"{here}hub data set {name!r} must be in the cache or within reach, but "
                      f"{why}: go online, or give a folder")


@contextmanager
def _hub_reach() -> Iterator[str]:
    """Why the hub cannot be reached, or ""; while it cannot, `datasets` reads its cache only.

    Without this the client retries for half a minute before it gives up.
    """
    import datasets
    from huggingface_hub import HfApi

    why = ""
    try:
        HfApi(endpoint=datasets.config.HF_ENDPOINT).dataset_info("nyu-mll/glue", timeout=PATIENCE)
    except Exception as error:
        why = f"the hub cannot be reached ({type(error).__name__})"
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or bool(why)
    try:
        yield why
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _from_dataset(name: str, found: Mapping[str, Any]) -> Task:
    """A `datasets.DatasetDict` to a task; class names are those of its label feature."""
    tables = {}
    for split, names in SPLITS.items():
        source = next((n for n in names if n in found), None)
        if source is not None:
            rows = found[source].to_list()
            tables[split] = Table(f"{name} {source}", rows, range(1, len(rows) + 1))
    if "train" not in tables:
        raise InputError(f"task {name!r} must have a train split, but has {', '.join(found)}")
    features = found["train"].features
    for column, feature in features.items():
        if type(feature).__name__ in ("Image", "Audio", "Video"):
            raise InputError(f"task must be text, but column {column!r} of {name!r} is of type "
                             f"{type(feature).__name__}; vision is not supported for now")
    named = {c: tuple(f.names) for c, f in features.items() if type(f).__name__ == "ClassLabel"}
    first = resolve(Recipe(), tables["train"])
    return _build(name, tables, Recipe(labels=named.get(first.label)))

"""Tuning spaces: which knobs an outer loop turns, and how far, as TOML.

    description = "..."
    base = "wide"                     # the space that the search's own spaces are made from
    extends = "default"               # knobs of another tuning space, before those of this one

    [[knob]]
    name = "strategy"                 # see searchpet.knobs
    choices = ["bilevel", "uniform:bias"]

    [[knob]]
    name = "bilevel.alpha_lr"         # counts where that strategy runs
    low = 0.01
    high = 1.0
    log = true
    default = 0.1                     # else the first choice, or `low`

    [[knob]]
    name = "option.lora.rank"
    choices = [1, 2, 4]
    when = { kinds = "*lora*" }       # globs on the values of knobs that stand before it

    [[first]]                         # settings to try first, over the defaults
    strategy = "uniform:bias"

    known_good = false                # at the top: try nothing first, not even the defaults
"""

from __future__ import annotations

import fnmatch
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from searchpet.ask import SPACE, hyperparameters
from searchpet.errors import InputError, unknown
from searchpet.knobs import ALL, check_name, owner
from searchpet.spacefile import TUNE, Select, SpaceFile, folder, read_space, tune_names
from searchpet.spec import first_problem

DEFAULT = "default"
Value = bool | int | float | str


class Knob(BaseModel):
    """A name, what it may be set to, and when it counts."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    choices: tuple[Value, ...] = ()
    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    default: Value | None = None
    when: dict[str, tuple[str, ...]] = {}

    @field_validator("name")
    @classmethod
    def _turns_something(cls, value: str) -> str:
        check_name(value)
        return value

    @field_validator("when", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return {k: (v,) if isinstance(v, str) else v for k, v in value.items()} if isinstance(
            value, dict) else value

    @model_validator(mode="after")
    def _has_a_range(self) -> Knob:
        ends = (self.low, self.high)
        if bool(self.choices) == (ends != (None, None)):
            raise ValueError(f"{self.name} must have choices, or low and high")
        if self.choices and len(set(map(str, self.choices))) < len(self.choices):
            raise ValueError(f"choices of {self.name} must be distinct")
        if not self.choices:
            if self.low is None or self.high is None or not self.low < self.high:
                raise ValueError(f"low < high must hold for {self.name}, but got low={self.low}, "
                                 f"high={self.high}")
            if self.log and not self.low > 0:
                raise ValueError(f"low > 0 must hold for {self.name} with log, but got {self.low}")
        if self.default is not None and not self.allows(self.default):
            raise ValueError(f"default of {self.name} must be a value that it can have, but got "
                             f"{self.default!r}")
        return self

    @property
    def whole(self) -> bool:
        """Whether the range is of whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def start(self) -> Value:
        """The default value."""
        if self.default is not None:
            return self.default
        value = self.choices[0] if self.choices else self.low
        assert value is not None  # checked above
        return value

    def allows(self, value: Any) -> bool:
        """Whether it can be set to `value`."""
        if self.choices:
            return any(value == one and type(value) is type(one) for one in self.choices)
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        assert self.low is not None
        assert self.high is not None
        return bool(self.low <= value <= self.high)

    def counts(self, values: Mapping[str, Any]) -> bool:
        """Whether it is turned, after the knobs before it stand at `values`."""
        name = owner(self.name)
        if name and str(values.get("strategy", name)).partition(":")[0] != name:
            return False
        return all(key in values and any(fnmatch.fnmatchcase(str(values[key]), glob)
                                         for glob in globs)
                   for key, globs in self.when.items())


class TuneFile(BaseModel):
    """The content of a tuning space."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    description: str
    base: str = SPACE
    extends: str | None = None
    knob: tuple[Knob, ...] = Field(min_length=1)
    first: tuple[dict[str, Value], ...] = ()
    known_good: bool = True

    @model_validator(mode="after")
    def _fits_together(self) -> TuneFile:
        base = read_space(self.base)
        before: dict[str, Knob] = {}
        for knob in self.knob:
            if knob.name in before:
                raise ValueError(f"knobs must be distinct, but {knob.name} stands twice")
            for other, globs in knob.when.items():
                if other not in before:
                    raise ValueError(f"when of {knob.name} must name a knob before it, but got "
                                     f"{other!r}")
                choices = before[other].choices
                for glob in globs if choices else ():
                    if not fnmatch.filter(map(str, choices), glob):
                        raise ValueError(
                            f"when of {knob.name} must match a choice of {other}, "
                            f"{', '.join(map(str, choices))}, but got {glob!r}")
            before[knob.name] = knob
        _check_choices(before, base)
        if "strategy" in before:
            for choice in before["strategy"].choices:
                hyperparameters(str(choice), {})
        for start in self.first:
            for name, value in start.items():
                if name not in before or not before[name].allows(value):
                    raise ValueError(f"first must set a knob to a value that it can have, but got "
                                     f"{name} = {value!r}")
        return self

    def starts(self) -> list[dict[str, Value]]:
        """Settings to try first: the defaults, then what the file names, without repetitions; none
        where the file wants no `known_good`.
        """
        if not self.known_good:
            return []
        found = [self.settled(given) for given in ({}, *self.first)]
        return [one for i, one in enumerate(found) if one not in found[:i]]

    def settled(self, given: Mapping[str, Value]) -> dict[str, Value]:
        """Values of the knobs that count: `given` ones over the defaults."""
        values: dict[str, Value] = {}
        for knob in self.knob:
            if knob.counts(values):
                values[knob.name] = given.get(knob.name, knob.start)
        return values


def _check_choices(knobs: Mapping[str, Knob], base: SpaceFile) -> None:
    """Raise ValueError where a choice of layers or kinds means nothing."""
    for choice in map(str, knobs["layers"].choices if "layers" in knobs else ()):
        if choice != ALL:
            Select(layers=choice)
    known = {rule.kind for rule in base.rule}
    for choice in map(str, knobs["kinds"].choices if "kinds" in knobs else ()):
        if wrong := sorted(set(choice.split("+")) - known):
            names = ", ".join(sorted(known))
            raise ValueError(f"kinds must be some of the base space's, {names}, joined by +, but "
                             f"got {wrong[0]!r}")


def read_tune(name: str, seen: Iterable[str] = ()) -> TuneFile:
    """The tuning space of that name, or of that TOML file.

    Raises InputError that names the file, the key, the value and what is allowed.
    """
    path = Path(name)
    if path.suffix != ".toml":
        if name not in tune_names():
            raise unknown("tuning space", name, tune_names())
        path = folder() / TUNE / f"{name}.toml"
    if not path.is_file():
        raise InputError(f"a tuning space's file must exist, but {path} does not")
    if name in seen:
        raise InputError(f"tuning space {name} must not extend itself")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        if isinstance(below := content.get("extends"), str):
            base = read_tune(below, (*seen, name))
            content = {"base": base.base, **content, "knob": [
                *(k.model_dump() for k in base.knob), *content.get("knob", [])],
                "first": [*base.first, *content.get("first", [])]}
        return TuneFile.model_validate(content)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"tuning space {name} must be TOML, but it is not: {error}") from error
    except ValidationError as error:
        raise InputError(f"tuning space {name}: {first_problem(error)}") from error

"""Space files: which kinds may sit where, as TOML.

    description = "..."
    [[rule]]
    kind = "lora"
    grain = "atom"
    options = { rank = 4 }
    select = { role = ["attention.query", "attention.value"], layers = "last 4" }
    [share]      # of the budget, what a kind may spend; the other kinds share the rest
    lora = 0.5
"""

from __future__ import annotations

import fnmatch
import re
import tomllib
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from searchpet import catalog
from searchpet.errors import InputError, unknown
from searchpet.site import Form, Site
from searchpet.spec import first_problem

_LAYERS = re.compile(r"^(?:(first|last) (\d+)(%?)|(\d+)(?:-(\d+))?|(\d+)%-(\d+)%)$")


class Select(BaseModel):
    """Which sites a rule applies to; all conditions must hold, globs are allowed in role, path."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    role: tuple[str, ...] = ("*",)
    form: tuple[Form, ...] = ("linear", "norm", "block", "layer")
    part: tuple[str, ...] = ("*",)
    path: tuple[str, ...] = ("*",)
    layers: str = ""

    @field_validator("role", "form", "part", "path", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("layers")
    @classmethod
    def _readable(cls, value: str) -> str:
        if value and not _LAYERS.match(value):
            raise ValueError('layers must read "3", "0-5", "first 2", "last 50%" or "25%-75%"')
        return value

    def matches(self, site: Site, depth: int) -> bool:
        """Whether the site is selected; `depth` is the number of blocks of its stack."""
        return (
            site.form in self.form
            and any(fnmatch.fnmatchcase(site.role, glob) for glob in self.role)
            and any(fnmatch.fnmatchcase(site.part, glob) for glob in self.part)
            and any(fnmatch.fnmatchcase(site.path, glob) for glob in self.path)
            and self._in_layers(site.layer, depth)
        )

    def _in_layers(self, layer: int, depth: int) -> bool:
        match = _LAYERS.match(self.layers)
        if not match:
            return True
        end, count, share, low, high, after, before = match.groups()
        if end:
            many = int(count) if not share else max(1, round(int(count) * depth / 100))
            return 0 <= layer < many if end == "first" else layer >= depth - many
        if after:  # by the middle of the layer
            return int(after) <= 100 * (layer + 0.5) / depth < int(before)
        return int(low) <= layer <= int(high or low)


class Rule(BaseModel):
    """A kind, its options, the grain of its coordinates, and where it may sit."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: str
    grain: str
    options: dict[str, bool | int | float | str] = {}
    select: Select = Select()

    @field_validator("kind")
    @classmethod
    def _kind_exists(cls, value: str) -> str:
        catalog.get("deltas", value)
        return value

    @field_validator("grain")
    @classmethod
    def _grain_exists(cls, value: str) -> str:
        catalog.get("grains", value)
        return value


class SpaceFile(BaseModel):
    """The content of a space file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    description: str
    rule: tuple[Rule, ...] = Field(min_length=1)
    share: dict[str, float] = {}

    @model_validator(mode="after")
    def _shares_add_up(self) -> SpaceFile:
        kinds = {rule.kind for rule in self.rule}
        for kind, value in self.share.items():
            if kind not in kinds:
                raise ValueError(f"share must name a kind of the rules, but got {kind!r}")
            if not 0 < value <= 1:
                raise ValueError(f"share.{kind} must be in (0, 1], but got {value}")
        if sum(self.share.values()) > 1 + 1e-9:
            raise ValueError(f"shares must add up to at most 1, but got {self.share}")
        return self


def folder() -> Path:
    """Where the space files are: beside the package in a checkout, inside it when installed."""
    inside = Path(__file__).parent / "spaces"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "spaces"


def toml(file: SpaceFile) -> str:
    """A space as the text of a space file."""
    return tomli_w.dumps(file.model_dump(mode="json", exclude_defaults=True))


TUNE = "tune"  # the part of the folder that holds tuning spaces, which are another kind of file


def space_names() -> list[str]:
    """Names of the space files that come with the package, such as `nano`, `uniform/bias`."""
    return [name for name in _names() if not name.startswith(f"{TUNE}/")]


def tune_names() -> list[str]:
    """Names of the tuning spaces that come with the package."""
    return [name.removeprefix(f"{TUNE}/") for name in _names() if name.startswith(f"{TUNE}/")]


def _names() -> list[str]:
    root = folder()
    return sorted(f.relative_to(root).with_suffix("").as_posix() for f in root.rglob("*.toml"))


def read_space(name: str) -> SpaceFile:
    """The space of that name, or of that TOML file.

    Raises InputError that names the file, the key, the value and what is allowed.
    """
    path = Path(name)
    if path.suffix != ".toml":
        if name not in space_names():
            raise unknown("space", name, space_names())
        path = folder() / f"{name}.toml"
    if not path.is_file():
        raise InputError(f"a space file must exist, but {path} does not")
    try:
        return SpaceFile.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"space {name} must be TOML, but it is not: {error}") from error
    except ValidationError as error:
        raise InputError(f"space {name}: {first_problem(error)}") from error

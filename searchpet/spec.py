"""Spec: what was found.  A small validated JSON file that says which coordinates of which kinds
sit where on which backbone, under which budget, and how it came about.  No tensors, no code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from searchpet.errors import InputError, unknown

VERSION = 1
SHIPPED = "searchpet:"  # before the name of a spec that comes with the package
_MAX_BYTES = 256 * 1000**2  # a spec is small; anything larger is not a spec

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]+$", max_length=500)]
Count = Annotated[int, Field(ge=0, le=10**15, strict=True)]
Option = bool | int | float | str


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class BackboneId(_Frozen):
    """Which frozen model: hub name, revision, hash of the architecture, parameters."""

    name: Annotated[str, Field(min_length=1, max_length=500)]
    revision: str | None
    config_hash: str
    parameters: Count


class MaskRef(_Frozen):
    """A mask too long for a list: it lies in `masks.safetensors` under the entry's key, as packed
    bits; `sha256` and `count` (what is kept) are those of the mask.  Of a prune mask of weights
    it is over their matrix, of PET over the parameters of what is kept.
    """

    shape: Annotated[tuple[int, ...], Field(min_length=1, max_length=2)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    count: Count


class Entry(_Frozen):
    """One delta: where, which kind with which options, and which of its coordinates are kept.

    A prune mask keeps what the list says and removes the rest, so its list may be empty; it is
    where `mask` says instead.  PET with a mask is sparse: the rest of its parameters is 0.
    """

    path: Name
    role: Name
    layer: Annotated[int, Field(ge=-1, le=100_000, strict=True)]
    kind: Name
    options: dict[str, Option]
    kept: list[Count]
    mask: MaskRef | None = None

    @model_serializer(mode="wrap")
    def _without_none(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = handler(self)
        return {key: value for key, value in content.items() if value is not None}

    @model_validator(mode="after")
    def _ascending(self) -> Entry:
        if any(a >= b for a, b in zip(self.kept, self.kept[1:], strict=False)):
            raise ValueError("kept coordinates must be ascending and distinct")
        return self

    @property
    def key(self) -> str:
        """Unique in a spec: path, role and kind."""
        return f"{self.path}:{self.role}:{self.kind}"


class BudgetUse(_Frozen):
    """limit = used + slack, in parameters; what the denominator counted."""

    text: str
    limit: Count
    used: Count
    slack: Count
    denominator: Count
    counts: Literal["deltas", "deltas and head"] = "deltas"

    @model_validator(mode="after")
    def _adds_up(self) -> BudgetUse:
        if self.used + self.slack != self.limit:
            raise ValueError(f"used + slack must equal limit, but got {self.used} + {self.slack} "
                             f"!= {self.limit}")
        return self


class KeepUse(_Frozen):
    """What inference may cost: `limit` of `dense`, of which the structure uses `used`."""

    measure: Name
    text: str
    limit: Annotated[float, Field(gt=0)]
    used: Annotated[float, Field(ge=0)]
    dense: Annotated[float, Field(gt=0)]

    @model_validator(mode="after")
    def _within(self) -> KeepUse:
        if self.used > self.limit:
            raise ValueError(f"used must be at most limit, but got {self.used} > {self.limit}")
        return self


class Ratio(_Frozen):
    """What a kind keeps at a role and relative depth (0 first layer, 1 last): for another size."""

    part: Name
    role: Name
    kind: Name
    depth: Annotated[float, Field(ge=0, le=1)]
    kept: Annotated[float, Field(ge=0, le=1)]


class Spec(_Frozen):
    """A found structure.  `Spec.load(path)`, `spec.save(path)`, `spec.hash`.

    entries say exactly what is kept, in the backbone's own numbering; plan says the same of its
    prune masks as shares by role and relative depth.
    """

    searchpet_spec: Literal[1] = 1
    backbone: BackboneId
    entries: tuple[Entry, ...]
    budget: BudgetUse
    keep: KeepUse | None = None
    plan: tuple[Ratio, ...] = ()
    provenance: dict[str, Any] = {}
    _folder: Path | None = PrivateAttr(default=None)

    def __eq__(self, other: object) -> bool:
        """Equal content, wherever it was read from."""
        return isinstance(other, Spec) and self.text() == other.text()

    def __hash__(self) -> int:
        return hash(self.hash)

    @property
    def folder(self) -> Path | None:
        """Where the spec was read from; masks of weights lie beside it."""
        return self._folder

    @model_validator(mode="after")
    def _distinct(self) -> Spec:
        seen: set[str] = set()
        for entry in self.entries:
            if entry.key in seen:
                raise ValueError(f"entries must be distinct, but {entry.key} stands twice")
            seen.add(entry.key)
        return self

    @property
    def hash(self) -> str:
        """sha256 over the canonical JSON of `backbone` and `entries`."""
        content = self.model_dump(mode="json", include={"backbone", "entries"})
        return hashlib.sha256(canonical(content).encode()).hexdigest()

    def text(self) -> str:
        """The file's content: canonical JSON, one line."""
        absent = {name for name in ("keep", "plan") if not getattr(self, name)}
        content = self.model_dump(mode="json", exclude=absent)
        return canonical({**content, "hash": self.hash}) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the spec.  Overwrites a file, never half of it."""
        target = Path(path)
        partial = target.with_name(target.name + ".partial")
        try:
            partial.write_text(self.text(), encoding="utf-8")
            partial.replace(target)
        except OSError as error:  # a full disk's own does not say where
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(target)) from error

    @classmethod
    def load(cls, path: str | Path) -> Spec:
        """Read and validate a spec file, the `spec.json` of a run folder, or `searchpet:NAME`.

        Raises InputError when the file is absent, is not a spec, is of another version, or its
        hash does not match its content.
        """
        source = located(path)
        source = source / "spec.json" if source.is_dir() else source
        if not source.is_file():
            raise InputError(f"a spec must be a file or a run folder with spec.json, but {path} "
                             "is neither")
        if source.stat().st_size > _MAX_BYTES:
            raise InputError(f"a spec must be at most {_MAX_BYTES:,} bytes, but {path} has "
                             f"{source.stat().st_size:,}")
        try:
            raw = json.loads(source.read_text(encoding="utf-8"), parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise InputError(f"a spec must be JSON, but {path} is not: {error}") from error
        spec = cls.parse(raw, str(path))
        spec._folder = source.parent
        return spec

    @classmethod
    def parse(cls, raw: Any, origin: str = "spec") -> Spec:
        """Validate decoded JSON.  Raises InputError naming the key, the value and the law."""
        if not isinstance(raw, Mapping) or "searchpet_spec" not in raw:
            raise InputError(f"{origin} must be a searchpet spec (an object with the key "
                             "searchpet_spec), but it is something else")
        if raw["searchpet_spec"] != VERSION:
            raise InputError(f"{origin} must be of version {VERSION}, but says "
                             f"{raw['searchpet_spec']!r}; use a searchpet that reads it")
        content = {key: value for key, value in raw.items() if key != "hash"}
        try:
            spec = cls.model_validate(content)
        except ValidationError as error:
            raise InputError(f"{origin}: {first_problem(error)}") from error
        if raw.get("hash") != spec.hash:
            raise InputError(f"{origin} must have the hash of its content, {spec.hash[:12]}…, but "
                             f"says {str(raw.get('hash'))[:12]}; it was edited or damaged, search "
                             "again or restore it")
        return spec


def located(path: str | Path) -> Path:
    """Where a spec lies; `searchpet:NAME` is one that comes with the package."""
    if not str(path).startswith(SHIPPED):
        return Path(path)
    folder, name = Path(__file__).parent / "found", str(path).removeprefix(SHIPPED)
    names = sorted(file.parent.name for file in folder.glob("*/spec.json"))
    if name not in names:
        raise unknown(f"{SHIPPED}NAME", name, names)
    return folder / name


def canonical(content: Any) -> str:
    """JSON with sorted keys and no spaces: equal content, equal text."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def first_problem(error: ValidationError) -> str:
    """One line of a pydantic error: the key's path, the law, the value.  Laws of our own may name
    the value by themselves.
    """
    problem = error.errors()[0]
    where = ".".join(map(str, problem["loc"]))
    own = problem.get("ctx", {}).get("error")
    law = str(own or problem["msg"])
    value = repr(problem["input"])
    value = value if len(value) <= 80 else value[:77] + "..."
    but = "" if own and " but " in law else f", but got {value}"
    return f"{where + ': ' if where else ''}{law}{but}"


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not allowed")

"""An outline: a spec as cells of roles x layers, with what each holds, for whoever draws it.

Parameters are counted on the backbone's own sites where its config is on this machine, else from
the tensors beside the spec.  Where neither is there, coordinates stand for them, and `exact` says
so.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from searchpet import catalog
from searchpet.apply import DELTA_FILE, asked_before
from searchpet.backbone import skeleton
from searchpet.discover import discover
from searchpet.errors import InputError
from searchpet.inherit import FILE as INHERITED
from searchpet.realise import pet_grafts, structure
from searchpet.run import RunFolder
from searchpet.site import Site
from searchpet.spec import Spec

Row = tuple[str, str]  # part and role
ORDER = (  # of roles, as a text passes them; others stand after their family
    "norm.embedding", "norm.attention", "attention.query", "norm.query", "attention.key",
    "norm.key", "attention.value", "attention.other", "attention.output", "attention.block",
    "norm.attention_post", "norm.cross_attention", "cross_attention.query", "cross_attention.key",
    "cross_attention.value", "cross_attention.output", "cross_attention.block", "norm.ffn",
    "ffn.gate", "ffn.in", "ffn.other", "ffn.out", "ffn.block", "norm.ffn_post", "norm.other",
    "layer", "norm.final")


WHOLE = ("layers", "sublayers", "heads", "neurons")  # masks that leave nothing at 0


@dataclass(frozen=True)
class Place:
    """One PET delta.  kept: its coordinates; parameters: what it trains."""

    row: Row
    layer: int
    path: str
    kind: str
    kept: tuple[int, ...]
    parameters: int


@dataclass(frozen=True)
class Share:
    """What a prune mask keeps of one position, in [0, 1]; of `heads` and `neurons`, say."""

    row: Row
    layer: int
    kind: str
    kept: float


@dataclass(frozen=True)
class Outline:
    """rows: (part, role), all that the backbone has where that is known;  layers: blocks of the
    deepest part;  exact: parameters are parameters, and no stand-in;  title: of which spec;
    home: of which architecture, its hash.
    """

    title: str
    rows: tuple[Row, ...]
    layers: int
    places: tuple[Place, ...]
    shares: tuple[Share, ...]
    exact: bool
    home: str = ""

    @property
    def kinds(self) -> tuple[str, ...]:
        """By falling parameters."""
        total = Counter[str]()
        for place in self.places:
            total[place.kind] += place.parameters
        return tuple(name for name, _ in total.most_common())

    @property
    def total(self) -> int:
        return sum(place.parameters for place in self.places)

    @property
    def unit(self) -> str:
        return "parameters" if self.exact else "coordinates"

    def cells(self) -> dict[tuple[Row, int], Counter[str]]:
        """(row, layer) -> kind -> parameters."""
        found: dict[tuple[Row, int], Counter[str]] = {}
        for place in self.places:
            found.setdefault((place.row, place.layer), Counter())[place.kind] += place.parameters
        return found

    def gone(self) -> set[tuple[Row, int]]:
        """PET positions whose sublayer or layer is taken out."""
        dead = {(s.row[0], _family(s.row[1]), s.layer) for s in self.shares
                if s.kept == 0 and s.kind in WHOLE}
        held = {(place.row, place.layer) for place in self.places}  # a norm behind it may stay
        return {((part, role), layer) for part, role in self.rows for layer in range(self.layers)
                if {(part, _family(role), layer), (part, "layer", layer)} & dead
                and ((part, role), layer) not in held}


def outline(spec: Spec, sites: Sequence[Site] | None = None) -> Outline:
    """A spec as cells; sites: of its backbone, by default found where that is at hand."""
    sites = sites_of(spec) if sites is None else sites
    counts = _counted(spec, sites) if sites else None
    counts = counts or _stored(spec)
    masks = {ratio.kind for ratio in spec.plan}
    pet = [e for e in spec.entries if e.kind not in masks and (e.kept or not e.mask)]
    exact = all(entry.mask or (counts and entry.key in counts) for entry in pet)
    parts = {(site.path, site.role): site.part for site in sites}
    places = tuple(Place(
        (parts.get((e.path, e.role)) or part_of(e.path), e.role), e.layer, e.path, e.kind,
        tuple(e.kept), e.mask.count if e.mask else counts[e.key] if exact else len(e.kept))
        for e in pet)
    shares = (*_planned(spec, sites), *_masked(spec, masks))
    rows = {place.row for place in places} | {
        (site.part, site.role) for site in sites if site.form in ("linear", "norm")}
    depths = [place.layer for place in places if place.row[1] != "norm.final"]
    blocks = [place.layer - 1 for place in places if place.row[1] == "norm.final"]
    blocks += [s.layer for s in sites if s.form != "norm"] + [s.layer for s in shares]
    return Outline(spec.hash[:8], ordered(rows), max([0, *depths, *blocks]) + 1, places, shares,
                   exact, spec.backbone.config_hash)


def ordered(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Encoder first, then as a text passes the roles."""
    def place(row: Row) -> tuple[bool, int, str]:
        near = [i for i, role in enumerate(ORDER) if _family(role) == _family(row[1])]
        known = ORDER.index(row[1]) if row[1] in ORDER else max(near, default=len(ORDER))
        return row[0] == "decoder", known, row[1]

    return tuple(sorted(rows, key=place))


def part_of(path: str) -> str:
    """The stack that a path names, or nothing."""
    return next((name for name in ("encoder", "decoder") if name in path.split(".")[:3]), "")


def sites_of(spec: Spec) -> tuple[Site, ...]:
    """The sites of a spec's backbone; none where its config is not on this machine."""
    asked = asked_before(RunFolder(spec.folder)).get("model") if spec.folder else None
    for name in dict.fromkeys((asked, spec.backbone.name)):
        if isinstance(name, str) and (model := skeleton(name, spec.backbone.config_hash)):
            return discover(model)
    return ()


def _family(role: str) -> str:
    """`attention.query` -> `attention`; a norm is of what it stands before or after."""
    head, _, tail = role.partition(".")
    return tail.removesuffix("_post") if head == "norm" else head


def _counted(spec: Spec, sites: Sequence[Site]) -> dict[str, int] | None:
    """Entry -> parameters on what pruning leaves of its host; None for what fits no site."""
    try:
        plan = structure(spec, sites)
        return {entry.key: graft.parameters
                for entry, graft in zip(plan.pet, pet_grafts(plan, 0), strict=True)}
    except (InputError, OSError):  # masks that lie elsewhere, another class of the same family
        return None


def _stored(spec: Spec) -> dict[str, int]:
    """Entry -> elements of its tensors beside the spec; nothing where there are none."""
    for name in (DELTA_FILE, INHERITED):
        file = (spec.folder or Path("nowhere")) / name
        if spec.folder and file.is_file():
            try:
                with safe_open(file, framework="np") as tensors:
                    sizes = {key: math.prod(tensors.get_slice(key).get_shape())
                             for key in tensors.keys()}  # noqa: SIM118  no mapping
            except SafetensorError:
                continue
            found = Counter[str]()
            for key, size in sizes.items():
                found[key.rpartition("/")[0]] += size
            return dict(found)
    return {}


def _planned(spec: Spec, sites: Sequence[Site]) -> list[Share]:
    """The spec's plan, depths as layers."""
    found = []
    for part in {ratio.part for ratio in spec.plan}:
        mine = [ratio for ratio in spec.plan if ratio.part == part]
        known = [s.layer for s in sites if s.part == part and s.form != "norm"]
        last = max(known, default=len({ratio.depth for ratio in mine}) - 1)
        found += [Share((part, r.role), round(r.depth * last), r.kind, r.kept) for r in mine]
    return found


def _masked(spec: Spec, units: set[str]) -> list[Share]:
    """Masks of single weights."""
    return [Share((part_of(e.path), e.role), e.layer, e.kind,
                  e.mask.count / max(1, math.prod(e.mask.shape)))
            for e in spec.entries if e.kind not in units and e.mask and not e.kept]


def label(row: Row, rows: Iterable[Row]) -> str:
    """A row's name; with its part where there are several."""
    several = len({part for part, _ in rows}) > 1
    return f"{row[0]} {row[1]}".strip() if several else row[1]


def mask_label(row: Row, kind: str, rows: Iterable[Row]) -> str:
    """A mask's name: `heads kept, attention`."""
    role = _family(row[1]) if kind in WHOLE else row[1]
    return f"{kind} kept" if role == "layer" else f"{kind} kept, {label((row[0], role), rows)}"


def column(layer: int, layers: int) -> str:
    """A layer's name: numbers as everywhere, words before the first and after the last."""
    return "in" if layer < 0 else "out" if layer >= layers else str(layer)


def alike(place: Place) -> set[int]:
    """Its coordinates, to be compared: atoms of a factorisation, which are the same before they
    have learned, are the first so many.
    """
    try:
        atoms = catalog.get("deltas", place.kind).atoms
    except InputError:  # a kind of a plugin that is not here
        atoms = False
    return set(range(len(place.kept)) if atoms else place.kept)


def coordinates(entries: Sequence[Place]) -> set[tuple[str, str, str, int]]:
    """All that a structure keeps, as (path, role, kind, number)."""
    return {(e.path, e.row[1], e.kind, number) for e in entries for number in alike(e)}


"""Diff: what two specs on one backbone keep alike, beside what chance would give.

Positions are compared coordinate by coordinate, rank atoms of one site by their number: before
they have learned they are alike.  Overlap is Jaccard's index |A and B| / |A or B|: of the units
where both come from the same space, else of coordinates, and of their parameters.

Chance is a draw: for each kind as many units as each spec keeps, anywhere in the space.  The
expected overlap of single channels is a b / N; of a site with r alike atoms sum_j P(X >= j)
P(Y >= j), X and Y hypergeometric.  It is given as the index of the expected sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from searchpet.errors import InputError
from searchpet.outline import Outline, Place, Row, alike, outline, sites_of
from searchpet.searched import exchangeable, keep_of, space_of
from searchpet.space import Space
from searchpet.spec import Spec

COUNTS = ("only_a", "both", "only_b", "parameters_a", "parameters_b", "shared")


@dataclass(frozen=True)
class Change:
    """One kind at one position.  only_a, both, only_b: coordinates; parameters_*: of each spec."""

    part: str
    role: str
    layer: int
    kind: str
    only_a: int
    both: int
    only_b: int
    parameters_a: int
    parameters_b: int
    shared: int  # parameters of what both keep, by the cheaper of the two

    @property
    def differs(self) -> int:
        return self.only_a + self.only_b

    def plus(self, other: Change) -> Change:
        """Both together, at the first one's position."""
        return Change(self.part, self.role, self.layer, self.kind,
                      *(getattr(self, name) + getattr(other, name) for name in COUNTS))


@dataclass(frozen=True)
class MaskChange:
    """What each of two specs leaves of what a mask could take, in [0, 1]."""

    part: str
    role: str
    layer: int
    kind: str
    kept_a: float
    kept_b: float


@dataclass(frozen=True)
class Overlap:
    """of: units, coordinates, parameters, removed units;  chance: of the index, if known."""

    of: str
    a: int
    b: int
    both: int
    jaccard: float
    chance: float | None


@dataclass(frozen=True)
class Side:
    """One of the two specs."""

    hash: str
    strategy: str
    task: str
    budget: str
    parameters: int
    coordinates: int
    positions: int


@dataclass(frozen=True)
class Diff:
    """backbone: its name;  changes: all positions of PET, the most different first;  note: what
    cannot be said, and why.
    """

    backbone: str
    a: Side
    b: Side
    overlap: tuple[Overlap, ...]
    changes: tuple[Change, ...]
    masks: tuple[MaskChange, ...]
    note: str = ""


def diff(a: Spec | str | Path, b: Spec | str | Path) -> Diff:
    """Compare two specs.  Raises InputError for specs of two architectures."""
    first, second = (s if isinstance(s, Spec) else Spec.load(s) for s in (a, b))
    if first.backbone.config_hash != second.backbone.config_hash:
        raise InputError("a diff must be between specs of one architecture, but they are of "
                         f"{first.backbone.name} and of {second.backbone.name}, another one; "
                         "carry one over first: searchpet transfer SPEC --model OTHER")
    sites = sites_of(first) or sites_of(second)
    one, two = outline(first, sites), outline(second, sites)
    changes = positions(one, two)
    spaces = space_of(first, sites), space_of(second, sites)
    space = spaces[0] if same(*spaces) else None
    if space is not None:
        own, note = list(_of_units(first, second, space, changes)), ""
    else:
        own = [_plain("coordinates", changes), _parameters(changes, None)]
        note = _why(first, second, bool(sites), spaces)
    return Diff(first.backbone.name, _side(first, one), _side(second, two), tuple(own),
                tuple(changes), tuple(mask_changes(one, two)), note)


def positions(a: Outline, b: Outline) -> list[Change]:
    """What each keeps of every kind at every position of PET, the most different first."""
    where: dict[tuple[Row, int, str, str], list[Place | None]] = {}
    for side, one in enumerate((a, b)):
        for place in one.places:
            at = (place.row, place.layer, place.kind, place.path)
            where.setdefault(at, [None, None])[side] = place
    merged: dict[tuple[Row, int, str], Change] = {}
    for (row, layer, kind, _), (first, second) in where.items():
        found = _change(row, layer, kind, first, second)
        before = merged.get((row, layer, kind))
        merged[row, layer, kind] = found if before is None else before.plus(found)
    return sorted(merged.values(), key=lambda c: (-c.differs, c.part, c.layer, c.role, c.kind))


def _change(row: Row, layer: int, kind: str, a: Place | None, b: Place | None) -> Change:
    mine, other = (alike(place) if place else set() for place in (a, b))
    both = len(mine & other)
    each = min((p.parameters / max(1, len(p.kept)) for p in (a, b) if p), default=0.0)
    return Change(row[0], row[1], layer, kind, len(mine) - both, both, len(other) - both,
                  a.parameters if a else 0, b.parameters if b else 0, round(both * each))


def mask_changes(a: Outline, b: Outline) -> list[MaskChange]:
    """Where masks keep different shares; where there is no mask all is kept."""
    first, second = ({(s.row, s.layer, s.kind): s.kept for s in one.shares} for one in (a, b))
    found = [MaskChange(*row, layer, kind, first.get((row, layer, kind), 1.0),
                        second.get((row, layer, kind), 1.0))
             for row, layer, kind in sorted(first.keys() | second.keys())]
    return [change for change in found if change.kept_a != change.kept_b]


def same(a: Space | None, b: Space | None) -> bool:
    """Whether two spaces have the same units."""
    return (a is not None and b is not None and len(a) == len(b)
            and [(p.site, p.kind, p.options, p.grain) for p in a.placements]
            == [(p.site, p.kind, p.options, p.grain) for p in b.placements])


def _of_units(a: Spec, b: Spec, space: Space, changes: Sequence[Change]) -> Iterator[Overlap]:
    one, two = (keep_of(spec, space, alike=True) for spec in (a, b))
    pet = ~space.prunes
    chance = expected(space, one & pet, two & pet)
    yield _index("units", one & pet, two & pet, chance[0])
    yield _parameters(changes, chance[1])
    if bool(space.prunes.any()):
        gone = ~one & space.prunes, ~two & space.prunes
        yield _index("removed units", *gone, expected(space, *gone)[0])


def _index(of: str, a: Tensor, b: Tensor, chance: float) -> Overlap:
    n, m, both = int(a.sum()), int(b.sum()), int((a & b).sum())
    return Overlap(of, n, m, both, _jaccard(n, m, both), chance)


def _plain(of: str, changes: Sequence[Change]) -> Overlap:
    both = sum(c.both for c in changes)
    a, b = both + sum(c.only_a for c in changes), both + sum(c.only_b for c in changes)
    return Overlap(of, a, b, both, _jaccard(a, b, both), None)


def _parameters(changes: Sequence[Change], chance: float | None) -> Overlap:
    a, b, both = (sum(getattr(c, name) for c in changes)
                  for name in ("parameters_a", "parameters_b", "shared"))
    return Overlap("parameters", a, b, both, _jaccard(a, b, both), chance)


def _jaccard(a: float, b: float, both: float) -> float:
    """1 for two empty sets: they are the same."""
    either = a + b - both
    return both / either if either > 0 else 1.0


def expected(space: Space, a: Tensor, b: Tensor) -> tuple[float, float]:
    """Jaccard's index that chance gives to structures of these sizes: of units, of parameters.

    a, b: bool (units,).  Parameters are those of unpruned hosts.
    """
    cost, sizes, weights = space.cost.double(), [0.0] * 3, [0.0] * 3
    kinds = [p.kind for p in space.placements]
    atoms = torch.tensor([exchangeable(p) and p.grain == "atom" for p in space.placements])
    for kind in dict.fromkeys(kinds):
        mine = torch.tensor([k == kind for k in kinds])[space.owner]
        many, n, m = int(mine.sum()), int(a[mine].sum()), int(b[mine].sum())
        if not many:
            continue
        both = torch.full((len(space),), n * m / many**2, dtype=torch.float64)
        grouped = torch.bincount(space.owner[mine & atoms[space.owner]],
                                 minlength=len(kinds))
        for size in set(grouped.tolist()) - {0, 1}:
            own = mine & (grouped[space.owner] == size)
            both[own] = _alike(many, n, m, size) / size
        for found, worth in ((sizes, torch.ones_like(cost)), (weights, cost)):
            whole = float(worth[mine].sum())
            for i, value in enumerate((whole * n / many, whole * m / many,
                                       float((worth * both)[mine].sum()))):
                found[i] += value
    return _jaccard(*sizes), _jaccard(*weights)


def _alike(many: int, a: int, b: int, size: int) -> float:
    """Expected min(X, Y) at a site of `size` atoms, X and Y drawn with a and b among `many`."""
    return sum(_at_least(many, a, size, j) * _at_least(many, b, size, j)
               for j in range(1, size + 1))


def _at_least(many: int, drawn: int, size: int, j: int) -> float:
    """P(X >= j), X hypergeometric: members of a group of `size` among `drawn` of `many`."""
    def ways(n: int, k: int) -> float:
        return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)

    low, high = max(j, drawn - (many - size)), min(size, drawn)
    return min(1.0, sum(math.exp(ways(size, x) + ways(many - size, drawn - x) - ways(many, drawn))
                        for x in range(low, high + 1)))


def _side(spec: Spec, one: Outline) -> Side:
    made = spec.provenance
    return Side(spec.hash, str(made.get("strategy", "hand")), str(made.get("task", "")),
                spec.budget.text, spec.budget.used, sum(len(p.kept) for p in one.places),
                len(one.places))


def _why(a: Spec, b: Spec, known: bool, spaces: Sequence[Space | None]) -> str:
    """Why chance cannot be said."""
    if not known:
        return (f"units and chance need the config of {a.backbone.name}, which is not on this "
                "machine; coordinates are compared")
    if None not in spaces:
        return ("units and chance need one space, but these were chosen from two, "
                f"{a.provenance['space']} and {b.provenance['space']}; coordinates are compared")
    lost = (a, b)[spaces.index(None)].provenance.get("space")
    return (f"units and chance need the space that both were chosen from, but {lost or 'that'} is "
            "not here or has changed; coordinates are compared")

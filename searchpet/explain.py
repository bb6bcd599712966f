"""Explain: why a spec keeps what it keeps.

Each unit has the score that the search ended with, its rank in the order of choice, its cost, and
its margin: how far its worth lies above that of the best unit that was left out.  Worth is what
the strategy chose by: the score per parameter where it maximised their sum, else the score.  What
enters with more budget and what leaves with less are chosen by the same scores and in the same
way, with what is kept now as given, or as all there is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from searchpet.budget import fill
from searchpet.diff import same
from searchpet.errors import InputError
from searchpet.knapsack import pack
from searchpet.outline import outline
from searchpet.scored import Scores, read
from searchpet.searched import exchangeable, keep_of, space_of
from searchpet.space import Space
from searchpet.spec import Spec

STEP = 10  # per cent of the budget, for what comes next and what goes first


@dataclass(frozen=True)
class Unit:
    """coordinate: its first one's number at the site;  coordinates: how many;  rank: from 1, among
    PET or among masks;  cost: parameters;  often: of all runs given, the share that keeps it.
    """

    part: str
    role: str
    layer: int
    kind: str
    path: str
    coordinate: int
    coordinates: int
    kept: bool
    cost: int
    score: float | None = None
    rank: int | None = None
    worth: float | None = None
    margin: float | None = None
    often: float | None = None


@dataclass(frozen=True)
class Explained:
    """by: what units were chosen by;  cut: worth of the best PET unit left out;  runs: over how
    many `often` counts;  kept, enters, leaves: PET, by falling worth;  masks: all that could be
    pruned, by falling score;  notes: what cannot be said, and why.
    """

    hash: str
    backbone: str
    strategy: str
    limit: int
    used: int
    by: str
    cut: float | None
    runs: int
    kept: tuple[Unit, ...]
    enters: tuple[Unit, ...]
    leaves: tuple[Unit, ...]
    masks: tuple[Unit, ...]
    notes: tuple[str, ...]


def explain(spec: Spec | str | Path, others: Sequence[Spec | str | Path] = ()) -> Explained:
    """Say of every unit that a spec keeps why.  others: runs of the same search, of other seeds.

    Raises InputError for others of another space, and for scores that are damaged.
    """
    found = spec if isinstance(spec, Spec) else Spec.load(spec)
    space = space_of(found)
    if space is None:
        if others:
            raise InputError("--with must compare units, but the space of the spec, or its "
                             "backbone's config, is not on this machine; drop --with")
        return _bare(found)
    scores = read(found)
    if scores is not None and len(scores.score) != len(space):
        raise InputError(f"scores must be of the {len(space):,} units of the space, but there are "
                         f"{len(scores.score):,}; search again")
    often = _often(found, space, [o if isinstance(o, Spec) else Spec.load(o) for o in others])
    return _told(found, space, scores, often, 1 + len(others))


def _often(spec: Spec, space: Space, others: Sequence[Spec]) -> Tensor | None:
    """How many of the runs, this one too, keep each unit: share (units,); None without others.

    Atoms are counted: the k-th that is kept here is the k-th of any other's.
    """
    if not others:
        return None
    counts = keep_of(spec, space, alike=True).double()
    for other in others:
        if not same(space, space_of(other)):
            raise InputError(f"--with must name runs of the same space on the same backbone, but "
                             f"{other.folder or other.hash[:8]} has another, or it is not here; "
                             "drop it")
        counts += keep_of(other, space, alike=True)
    keep = keep_of(spec, space)
    place = torch.arange(len(space))
    for p in space.placements:
        if exchangeable(p) and p.grain == "atom":
            own = space.unit[p.start : p.start + p.width]
            place[torch.cat([own[keep[own]], own[~keep[own]]])] = own
    return counts[place] / (1 + len(others))


def _told(spec: Spec, space: Space, scores: Scores | None, often: Tensor | None, runs: int,
          ) -> Explained:
    keep, pet = keep_of(spec, space), ~space.prunes
    price = space.cost if scores is None else scores.price
    worth = _worth(scores)
    rows = _Rows(space, keep, price, scores, worth, often)
    left = pet & ~keep & (price > 0)
    cut = float(worth[left].max()) if worth is not None and bool(left.any()) else None
    enters = leaves = torch.zeros(0, dtype=torch.int64)
    if scores is not None and scores.density is not None:
        limit = int(price[keep & pet].sum()) + spec.budget.slack
        enters, leaves = _next(scores, keep & pet, left, limit)
    masks = space.prunes.nonzero().squeeze(-1)
    return Explained(
        spec.hash, spec.backbone.name, str(spec.provenance.get("strategy", "hand")),
        spec.budget.limit, spec.budget.used,
        "" if scores is None or scores.density is None else
        "score per parameter" if scores.density else "score", cut, runs,
        rows.of((keep & pet).nonzero().squeeze(-1), cut), rows.of(enters, cut),
        rows.of(leaves, cut), rows.of(masks, None), tuple(_notes(spec, space, scores)))


def _worth(scores: Scores | None) -> Tensor | None:
    """What units were chosen by, (units,); None where that is not known."""
    if scores is None or scores.density is None:
        return None
    return scores.score / scores.price.clamp(min=1) if scores.density else scores.score


def _next(scores: Scores, keep: Tensor, left: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Numbers of what comes with STEP per cent more budget, and of what goes with as much less."""
    take: Callable[[Tensor, Tensor, int], Tensor] = pack if scores.density else fill

    def best(among: Tensor, budget: int) -> Tensor:
        own = among.nonzero().squeeze(-1)
        return own[take(scores.score[own], scores.price[own], max(0, budget))]

    more, less = limit * (100 + STEP) // 100, limit * (100 - STEP) // 100
    enters = best(left, more - int(scores.price[keep].sum()))
    fixed = keep & scores.must
    stays = fixed.clone()
    stays[best(keep & ~fixed, less - int(scores.price[fixed].sum()))] = True
    return enters, (keep & ~stays).nonzero().squeeze(-1)


def _notes(spec: Spec, space: Space, scores: Scores | None) -> Sequence[str]:
    if scores is None:
        return ["no scores lie beside this spec, so why a unit was kept, its margin, and what "
                "comes next cannot be said; searchpet search keeps them in its run folder"]
    found = []
    if scores.density is None:
        found.append(f"strategy {spec.provenance.get('strategy')} has not chosen unit by unit, so "
                     "margins and what comes next cannot be said")
    if space.share:
        found.append("the space gives kinds a share of the budget, which what comes next and what "
                     "goes first leave aside")
    if bool(space.prunes.any()):
        found.append("masks are taken with what hangs on them, so theirs have no margin")
    return found


class _Rows:
    """Units as rows."""

    def __init__(self, space: Space, keep: Tensor, price: Tensor, scores: Scores | None,
                 worth: Tensor | None, often: Tensor | None) -> None:
        self.space, self.keep, self.price = space, keep, price
        self.scores, self.worth, self.often = scores, worth, often
        self.many = torch.bincount(space.unit, minlength=len(space))
        self.rank = torch.zeros(len(space), dtype=torch.int64)
        score = torch.zeros(len(space)) if scores is None else scores.score
        for own, value in ((space.prunes, score), (~space.prunes, score if worth is None
                                                   else worth)):
            numbers = own.nonzero().squeeze(-1)
            ranked = numbers[value[numbers].argsort(descending=True, stable=True)]
            self.rank[ranked] = torch.arange(1, len(numbers) + 1)

    def of(self, numbers: Tensor, cut: float | None) -> tuple[Unit, ...]:
        """Rows by rank; numbers int64."""
        return tuple(self._one(i, cut) for i in numbers[self.rank[numbers].argsort()].tolist())

    def _one(self, i: int, cut: float | None) -> Unit:
        p = self.space.placements[int(self.space.owner[i])]
        worth = None
        if self.worth is not None and p.neutral == 0:
            worth = float(self.worth[i])
        return Unit(
            p.site.part, p.site.role, p.site.layer, p.kind, p.site.path, int(self.space.first[i]),
            int(self.many[i]), bool(self.keep[i]), int(self.price[i]) if p.neutral == 0 else 0,
            None if self.scores is None else float(self.scores.score[i]),
            None if self.scores is None else int(self.rank[i]), worth,
            None if worth is None or cut is None else worth - cut,
            None if self.often is None else float(self.often[i]))


def _bare(spec: Spec) -> Explained:
    """A spec whose space is not here: its coordinates and what they cost."""
    one = outline(spec)
    kept = tuple(Unit(*place.row, place.layer, place.kind, place.path, c, 1, True,
                      place.parameters // max(1, len(place.kept)) if one.exact else 0)
                 for place in one.places for c in place.kept)
    return Explained(
        spec.hash, spec.backbone.name, str(spec.provenance.get("strategy", "hand")),
        spec.budget.limit, spec.budget.used, "", None, 1, kept, (), (), (),
        ("the space that this spec was chosen from, or its backbone's config, is not on this "
         "machine or has changed, so scores, margins and what comes next cannot be said",))

"""Prune by the loss itself: what can go without a rise of the validation loss goes, then PET.

AxFormer, Nagarajan et al. 2020, arXiv:2010.03688: elements of a tuned model are tried from coarse
to fine (layers, sublayers, attention heads and neurons), the least important first, and one stays
out where the loss does not rise; a finer element is tried only where the coarser one had to stay.
Here all PET of the space and the head are tuned, for `train` of the steps; heads and neurons are
tried in `pieces` per mask, so that trials stay few.  Then PET starts anew and is searched on what
is left.

What a hard limit adds to the paper: removal stops where the limit on inference is met, unless
`beyond`; where it is not met by removals that cost nothing, what raises the loss least for what it
saves goes next, in `rounds` between which all is measured again; what was taken too much comes
back.  These are recorded as `forced`.  A saving beyond what is still to go counts for nothing.
The paper's hard attention is left out: it changes no structure.

Ranking.notes["removed"] lists the removals in order: `what`, how many `units`, the loss `before`
and `after` (of a forced one as measured alone in its round), and `forced`.  Each trial is a step
of a loop, so that a search that was killed goes on at the trial where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from searchpet import catalog
from searchpet.errors import InputError, unknown
from searchpet.importance import names
from searchpet.limits import Limits
from searchpet.probe import evaluating
from searchpet.strategies import Learner, Problem, Ranking, descend, law

TRAINS = True
PRUNES = True  # needs masks and a limit on what they leave

Judge = Callable[[Tensor], float]  # keep (units,) bool -> loss


def search(
    problem: Problem,
    *,
    train: float = 0.5,  # of the steps, before anything is tried: order needs a tuned model
    score: str = "gate",  # the order of trials; sees the tuned model and costs a few passes
    batches: int = 4,  # of validation in a trial; with fewer, noise decides
    pieces: int = 4,  # that a mask's heads or neurons are tried in; 1.5 trials a layer each
    rounds: int = 2,  # of measuring again where the limit asks for more
    beyond: bool = False,  # go on below the limit while the loss allows it, as the paper does
    pet: str = "bilevel",  # the strategy that searches PET on what is left
) -> Ranking:
    """Prune by trials until the limit on inference is met, then keep PET units within theirs.

    Raises InputError for a hyperparameter out of its range and where there is nothing to prune.
    With the defaults a stack of n layers takes at most 3 (11 n + 1) trials.
    """
    law("loss_delta.train", train, 0 <= train <= 1, "a share of the steps in [0, 1]")
    for name, value in (("batches", batches), ("pieces", pieces), ("rounds", rounds)):
        law(f"loss_delta.{name}", value, value >= 1, "at least 1")
    if problem.keep is None:
        raise InputError("loss_delta prunes, but no limit on inference is given; add "
                         "--keep-flops 60%")
    if score not in names():  # now, not after the training
        raise unknown("score of prune units", score, names())
    strategy: Callable[[Problem], Ranking] = catalog.get("strategies", pet)
    trials = _Trials(problem, round(train * problem.steps), score, batches, pieces, rounds)
    keep, removed = prune(problem.limits, trials, trials.groups, rounds, beyond)
    trials.rewind()
    found = strategy(replace(problem, settled=keep))
    return replace(found, notes={**found.notes, "removed": removed, "tried": trials.asked})


# --- what is tried ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Prune units (n,) int64 that are tried together."""

    name: str
    units: Tensor


def groups_of(limits: Limits, score: Tensor, pieces: int) -> list[Group]:
    """What is tried, in order: layers, sublayers, then pieces of the masks inside.

    Within a level the least score (units,) per cost comes first; a piece holds units of similar
    score, the highest last.  What a stack needs to stay alive is in none, so a group may be empty.
    """
    levels: list[dict[str, list[Tensor]]] = [{}, {}, {}]
    masks = [p for p in limits.space.placements if p.neutral == 1]
    for p in masks:
        units = limits.space.unit[p.start : p.start + p.width].unique()
        layer = f"{p.site.part} layer {p.site.layer}"
        within = p.site.role.partition(".")[0]
        levels[0].setdefault(layer, []).append(units)
        if within != "layer":
            levels[1].setdefault(f"{layer} {within}", []).append(units)
        if len(units) > 1:
            ordered = units[score[units].argsort(stable=True)]
            for i, piece in enumerate(ordered.tensor_split(min(pieces, len(units)))):
                levels[2][f"{layer} {p.kind} {i + 1}"] = [piece]
    vital, seen, found = limits.lifeline(score), set(), []
    for level in levels:
        joined = {name: torch.cat(parts).unique() if len(parts) > 1 else parts[0]
                  for name, parts in level.items()}
        new = {name: units for name, units in joined.items() if _key(units) not in seen}
        seen |= {_key(units) for units in new.values()}
        rest = [Group(name, units[~torch.isin(units, vital)]) for name, units in new.items()]
        found += sorted(rest, key=lambda group: _density(limits, score, group))
    return found


def _key(units: Tensor) -> tuple[int, ...]:
    return tuple(sorted(units.tolist()))


def _density(limits: Limits, score: Tensor, group: Group) -> float:
    """Score per cost of taking the group alone."""
    whole = torch.ones(len(score), dtype=torch.bool)
    return float(score[group.units].sum()) / max(1.0, _saving(limits, whole, group))


def without(keep: Tensor, group: Group) -> Tensor:
    """keep (units,) without the group's units."""
    return keep.index_fill(0, group.units, False)


def _saving(limits: Limits, keep: Tensor, group: Group) -> float:
    return limits.kept(keep) - limits.kept(without(keep, group))


# --- trials -------------------------------------------------------------------------------------


class _Trials:
    """Losses of structures with all PET open: asked one by one, each a step of the loop.

    The loop's first steps tune PET and the head, the next one scores the units, and each further
    one is a trial.  After a resume the losses that are known are given again in their order.
    """

    def __init__(self, problem: Problem, train: int, score: str, batches: int, pieces: int,
                 rounds: int) -> None:
        self.problem, self.batches, self.asked = problem, batches, 0
        order = torch.zeros(len(problem.space), dtype=torch.float64)
        count = len(groups_of(problem.limits, order, pieces))
        self.losses = torch.zeros((1 + rounds) * (1 + count) + 1, dtype=torch.float64)
        learn = Learner(problem)
        learn.crowd(problem.crowd)
        self.weights = learn.weights
        self.fresh = [p.detach().clone() for p in self.weights]
        self.loop = problem.loop(train + len(self.losses), weights=self.weights, learn=learn,
                                 order=order, losses=self.losses)
        self.steps, self.first = iter(self.loop), train
        self.at = self._tune(self.steps, learn)
        if self.at == train:
            order.copy_(self._score(score))
        self.groups = groups_of(problem.limits, order, pieces)

    def _tune(self, steps: Iterator[int], learn: torch.optim.Optimizer) -> int:
        """Train with everything open; the first step that is not of the training."""
        self.problem.net.z = torch.ones(len(self.problem.space))
        for step in steps:
            if step >= self.first:
                return step
            self.loop.report(loss=descend(self.problem, self.problem.train[step], learn))
        raise AssertionError("a loop has steps after the training")

    def _score(self, name: str) -> Tensor:
        with evaluating(self.problem.net.model):
            batches = [self.problem.train[i] for i in range(self.batches)]
            return self.problem.importance(name, batches)

    def __call__(self, keep: Tensor) -> float:
        """Mean loss of validation batches where prune gates are keep (units,) bool."""
        self.asked += 1
        if self.first + self.asked > self.at:
            self.at = next(self.steps)
        if self.first + self.asked == self.at:  # not known from before
            loss = self._measured(keep)
            self.losses[self.asked] = loss
            self.loop.report(loss=loss, kept=self.problem.limits.kept(keep))
        return float(self.losses[self.asked])

    @torch.no_grad()
    def _measured(self, keep: Tensor) -> float:
        problem = self.problem
        problem.net.z = torch.where(problem.space.prunes, keep, True).float()
        with evaluating(problem.net.model):
            losses = [float(problem.spread(problem.valid[i])) for i in range(self.batches)]
        return sum(losses) / len(losses)

    @torch.no_grad()
    def rewind(self) -> None:
        """Deltas and head as they were, so that what follows starts as every search does."""
        for weight, fresh in zip(self.weights, self.fresh, strict=True):
            weight.copy_(fresh)


# --- what goes ----------------------------------------------------------------------------------


def prune(limits: Limits, judge: Judge, groups: list[Group], rounds: int, beyond: bool,
          ) -> tuple[Tensor, list[dict[str, Any]]]:
    """keep (units,) bool within the limit on inference, and what was removed, in order."""
    assert limits.keep is not None
    keep, removed = _willing(limits, judge, groups, beyond)
    if limits.kept(keep) > limits.keep.limit:
        keep, forced = _forced(limits, judge, groups, keep, rounds)
        removed += forced
    return keep, removed


def _willing(limits: Limits, judge: Judge, groups: list[Group], beyond: bool,
             ) -> tuple[Tensor, list[dict[str, Any]]]:
    """Groups go, in their order, where the loss does not rise."""
    assert limits.keep is not None
    keep = torch.ones(len(limits.space), dtype=torch.bool)
    now, removed = judge(keep), []
    for group in groups:
        if not beyond and limits.kept(keep) <= limits.keep.limit:
            break
        trial = without(keep, group)
        if torch.equal(trial, keep):
            continue  # gone with something coarser, or vital
        found = judge(trial)
        if found <= now:
            removed.append(_note(group, keep, now, found, forced=False))
            keep, now = trial, found
    return keep, removed


def _forced(limits: Limits, judge: Judge, groups: list[Group], keep: Tensor, rounds: int,
            ) -> tuple[Tensor, list[dict[str, Any]]]:
    """Groups go by the loss that they cost for what they save, until the limit is met."""
    assert limits.keep is not None
    limit = limits.keep.limit
    over, removed, gone = limits.kept(keep) - limit, [], []
    for number in range(1, rounds + 1):
        target = limit + over * (1 - number / rounds)
        excess, now = limits.kept(keep) - target, judge(keep)
        rated = []
        for i, group in enumerate(groups):
            saving = _saving(limits, keep, group)
            if saving > 0 and excess > 0:
                found = judge(without(keep, group))
                rated.append(((found - now) / min(saving, excess), i, found))
        for _, i, found in sorted(rated):
            if limits.kept(keep) <= target:
                break
            if _saving(limits, keep, groups[i]) > 0:
                removed.append(_note(groups[i], keep, now, found, forced=True))
                gone.append(groups[i].units[keep[groups[i].units]])
                keep = without(keep, groups[i])
    return _given_back(limits, keep, gone), removed


def _given_back(limits: Limits, keep: Tensor, gone: list[Tensor]) -> Tensor:
    """keep with units of `gone` that still fit, those that went last first.

    What costs nothing, since what it sits in is gone, stays out.
    """
    assert limits.keep is not None
    keep = keep.clone()
    for unit in [i for units in reversed(gone) for i in reversed(units.tolist())]:
        before = limits.kept(keep)
        keep[unit] = True
        keep[unit] = before < limits.kept(keep) <= limits.keep.limit
    return keep


def _note(group: Group, keep: Tensor, before: float, after: float, forced: bool) -> dict[str, Any]:
    return {"what": group.name, "units": int(keep[group.units].sum()), "before": before,
            "after": after, "forced": forced}

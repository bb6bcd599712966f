"""Stability selection: a strategy runs several times; units are kept by how often it chose them.

Meinshausen and Buhlmann 2010, arXiv:0809.2932.  Every run starts from the same deltas and head,
with gate noise and dropout of its own, on batches drawn with replacement from those of the
search; every other run exchanges the two halves of the data.  A unit's score is the share of runs
that kept it; among equals the mean place in the runs' own rankings decides, by less than one run
counts.  Units are then taken by score, exactly within the limits.

It costs `runs` searches: `runs` times --steps steps, which the log states.  What is left for
--inherit is what the last run has learned.

What differs from the paper: it draws halves of the data without replacement and keeps what is
above a threshold; here rows come in batches, and the budget is the threshold.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from searchpet import catalog
from searchpet.errors import InputError
from searchpet.strategies import Batch, Problem, Ranking, law

TRAINS = True


@dataclass(frozen=True)
class Resampled:
    """Batches of a source in another order, some of them several times."""

    source: Any
    order: list[int]

    def __getitem__(self, step: int) -> Batch:
        batch: Batch = self.source[self.order[step % len(self.order)]]
        return batch


def search(
    problem: Problem,
    *,
    of: str = "bilevel",  # the strategy that is run, with its own defaults
    runs: int = 5,  # each costs a search; frequencies are multiples of one fifth
) -> Ranking:
    """Keep units by the share of runs that chose them, within the limits.

    Raises InputError for an unknown strategy, and for one that keeps single parameters.
    """
    law("ensemble.runs", runs, runs >= 2, "at least 2")
    name, _, variant = of.partition(":")
    if name == "ensemble":
        raise InputError("ensemble.of must be another strategy, such as bilevel, but got ensemble")
    member = catalog.get("strategies", name)
    count, steps = len(problem.space), problem.steps
    # drawn before the first run, whose loop sets the generator anew
    orders = torch.randint(steps, (runs, 2, steps), generator=problem.generator).tolist()
    weights: list[Tensor] = list(problem.net.trained)
    start = [p.detach().clone() for p in weights]
    chosen, places = torch.zeros(count).double(), torch.zeros(count).double()
    for run, (one, other) in enumerate(orders):
        with torch.no_grad():
            torch._foreach_copy_(weights, start)
        problem.net.z = torch.ones(count)
        halves = (problem.train, problem.valid)[:: 1 if run % 2 == 0 else -1]
        own = replace(problem, train=Resampled(halves[0], one), valid=Resampled(halves[1], other))
        if run:
            own.watch = _unwatched  # the record is that of one search
        found: Ranking = member(own, **({"variant": variant} if variant else {}))
        if found.masks:
            raise InputError(f"ensemble.of must keep whole units, but {of} keeps single "
                             "parameters; take --strategy " + of)
        chosen += found.keep.double()
        places += found.score.double().argsort(stable=True).argsort() / count
    score = (chosen + places / (2 * runs)) / runs
    keep = problem.limits.fill(score)
    return Ranking(score, keep, notes={
        "of": of, "runs": runs, "steps": runs * steps, "frequency": histogram(chosen[keep], runs)})


def histogram(chosen: Tensor, runs: int) -> dict[str, int]:
    """How many of the units (n,) were chosen how often: `3/5` -> 17; the most frequent first."""
    return {f"{k}/{runs}": n for k in range(runs, -1, -1) if (n := int((chosen == k).sum()))}


def _unwatched(*_: object) -> None:
    """Keeps no record."""

"""Polish: a given structure is improved by exchanges of units, each tried before it is kept.

The structure is trained alone, from silence.  Then, in rounds:

- Everything outside is opened beside it for a while and learns too; Fisher's information of the
  gates, E_rows[(dL_row/dz)^2], says then what each unit is worth (as in `progressive`).
- The units of the least information per parameter go, up to `swap` of the budget, and the best of
  the others come: greatest summed information, exactly within the limit.
- The changed structure trains on alone; the one it comes from, from where the round began, for as
  many steps in all.  The better on batches of the other half is kept.  After a failure half as
  much is exchanged.

Room that the structure leaves is filled in the first round, and what it has too much goes at
once.  Steps in all: `--steps`, one pass each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from searchpet import catalog
from searchpet.budget import fill
from searchpet.errors import InputError
from searchpet.slopes import information
from searchpet.stats import evaluating
from searchpet.strategies import Learner, Loop, Problem, Ranking, descend, law

PET_ALONE = True
TRAINS = True
CHOOSES = True  # not by one list of scores


def search(
    problem: Problem,
    *,
    spec: str = "",  # a file, a run folder or searchpet:NAME; "": what `of` finds
    of: str = "progressive",  # a strategy, with its defaults, in --steps steps of its own
    settle: float = 0.4,  # share of the steps in which the structure is trained first
    rounds: int = 2,  # exchanges that are tried; each needs some dozen steps to be judged by
    swap: float = 0.5,  # of the budget that the first exchange moves at most
    batches: int = 8,  # of the other half, that structures are judged by
) -> Ranking:
    """Exchange units of a structure for better ones, within the limit.

    Raises InputError for a hyperparameter out of its range, for a spec that cannot be read, and
    for one with units that the space does not have.
    """
    law("polish.settle", settle, 0 < settle < 1, "a share of the steps in (0, 1)")
    law("polish.rounds", rounds, rounds >= 1, "at least 1")
    law("polish.swap", swap, 0 < swap <= 1, "a share of the budget in (0, 1]")
    law("polish.batches", batches, batches >= 1, "at least 1")
    start = copies(problem)
    on = begin(problem, spec, of)
    put(problem, start)
    first = max(1, round(settle * problem.steps))
    each = max(1, (problem.steps - first) // (4 * rounds))
    bench, tried = Bench(problem, batches), []
    bench.train(on, first, 0)
    for at in range(first, first + rounds * 2 * each, 2 * each):
        before = copies(problem)
        loss, after = bench.train(on, 2 * each, at), copies(problem)
        put(problem, before)
        worth = bench.probe(on, each, at)
        other = bench.exchange(on, worth, swap)
        if torch.equal(other, on):
            put(problem, after)
            break
        new = bench.train(other, each, at + each)
        tried.append({"units": int((other & ~on).sum()), "loss": loss, "exchanged": new})
        if new < loss:
            on = other
        else:
            put(problem, after)
            swap /= 2
    return Ranking(worth + on * worth.max(), on, notes={"tried": tried})


def begin(problem: Problem, spec: str, of: str) -> Tensor:
    """The structure to improve, bool (units,), cut to the limit by chance where it is above."""
    if spec:
        keep = problem.units_of(spec)
    else:
        name, _, variant = of.partition(":")
        member = catalog.get("strategies", name)
        if any(catalog.about("strategies", name, what, False) for what in ("CHOOSES", "PRUNES")):
            raise InputError("polish.of must be a strategy that keeps whole PET units, such as "
                             f"bilevel, but got {of}")
        found: Ranking = member(problem, **({"variant": variant} if variant else {}))
        keep = found.keep
    order = torch.rand(len(keep), generator=problem.generator)
    kept = problem.limits.fill(torch.where(keep.cpu(), 1 + order, -torch.inf))
    return kept & (keep.cpu() | problem.space.prunes)


def copies(problem: Problem) -> list[Tensor]:
    """What deltas and head have learned."""
    return [p.detach().clone() for p in problem.net.trained]


@torch.no_grad()
def put(problem: Problem, values: Sequence[Tensor]) -> None:
    """Deltas and head, as they were."""
    torch._foreach_copy_(list(problem.net.trained), list(values))


@dataclass(frozen=True)
class Bench:
    """Where structures are trained and judged; batches: for scores, and as many to judge by."""

    problem: Problem
    batches: int

    def train(self, on: Tensor, steps: int, at: int) -> float:
        """Train on the batches from `at` on; the loss on some of the other half, after."""
        problem, gates = self.problem, on.float().to(self.problem.net.home)
        learn, loop = self.stage(steps, 1.0)
        for step in loop:
            problem.net.z = gates
            loop.report(loss=descend(problem, problem.train[at + step], learn))
        problem.net.z = gates
        with torch.no_grad(), evaluating(problem.net.model):
            losses = [problem.spread(problem.valid[i]) for i in range(self.batches)]
        return float(torch.stack(losses).mean())

    def probe(self, on: Tensor, steps: int, at: int) -> Tensor:
        """Train with everything open; what each unit is worth by then, (units,) float64."""
        problem = self.problem
        gates = (on | ~problem.space.prunes).to(problem.net.home)
        worth = torch.zeros(len(on), dtype=torch.float64, device=problem.net.home)
        learn, loop = self.stage(steps, problem.crowd, worth=worth)
        for step in loop:
            loss, square, found = information(
                problem.net, problem.spread, problem.train[at + step], gates, learn.weights)
            learn.follow(found)
            worth.lerp_(square, 2 / (step + 2))  # later steps count more
            loop.report(loss=loss)
        return worth.cpu()

    def stage(self, steps: int, crowd: float, **more: Tensor) -> tuple[Learner, Loop]:
        """An optimizer with deltas slowed down by `crowd`, and the loop of a training."""
        learn = Learner(self.problem)
        learn.crowd(crowd)
        return learn, self.problem.loop(steps, weights=learn.weights, learn=learn, **more)

    def exchange(self, on: Tensor, worth: Tensor, swap: float) -> Tensor:
        """The structure with its least units, up to a share of the budget, exchanged."""
        problem, limits = self.problem, self.problem.limits
        price = limits.price(on.double()).round().long()
        pet = (on & ~problem.space.prunes & ~limits.must & (price > 0)).nonzero().squeeze(-1)
        least = fill(-(worth[pet] / price[pet]), price[pet], int(swap * problem.limit))
        goes = torch.zeros_like(on)
        goes[pet[least]] = True
        stays = limits.at(problem.limit, must=(on & ~goes) | limits.must)
        return stays.fill(worth, density=True)

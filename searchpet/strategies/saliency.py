"""One shot: units are scored by gradients after a short warm-up; no gate is ever learned.

The head is fitted and every delta silent.  All gates are open, and a unit's score comes from
-dL/dz, the first-order loss that its gate saves, which for a unit with parameters theta is
-<dL/dtheta, theta> wherever the delta is linear in them:

- energy: theta is one small step of -lr^2 dL/dtheta on the same batch, so the score is the energy
  |lr dL/dtheta|^2 that the unit receives, summed over batches (Fisher's information, as in Sung et
  al. 2021, arXiv:2111.09839; of a LoRA at init all of it is |dL/dB|^2).  lr is the calibrated rate
  of the kind, so that kinds are comparable.
- agreement: theta is what the deltas have learned on one half of the data in the warm-up, the
  gradient that of the other half: <g_train, g_valid> summed along the way.  What a unit learns
  from single examples does not count.
- both: the mean of the two ranks.

Units are kept by score per parameter.  One shot scores units one at a time: of many that would
learn the same thing all score high, and where the untuned features say nothing about the labels
the first gradients are noise (see `docs/strategies/saliency.md` for what was measured).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from searchpet.errors import unknown
from searchpet.slopes import energy, worth
from searchpet.stats import evaluating
from searchpet.strategies import Learner, Problem, Ranking, descend, law

PET_ALONE = True  # prunes nothing; `prune_first` with pet=saliency does
BY = ("agreement", "energy", "both")


def search(
    problem: Problem,
    *,
    by: str = "agreement",  # energy alone finds no planted module more than chance
    warmup: float = 0.1,  # share of the steps in which the deltas learn, all gates open
    batches: int = 16,  # that gradients of gates are averaged over
) -> Ranking:
    """Score units once, then keep them by score per parameter within the limit.

    Raises InputError for a hyperparameter out of its range.
    """
    if by not in BY:
        raise unknown("saliency.by", by, BY)
    law("saliency.warmup", warmup, 0 < warmup <= 1, "a share of the steps in (0, 1]")
    law("saliency.batches", batches, batches >= 1, "at least 1")
    found = []
    if by != "agreement":
        found.append(energy(problem.net, problem.spread, problem.rates,
                            [problem.train[i] for i in range(batches)], opened(problem)))
    if by != "energy":
        learn(problem, max(1, round(warmup * problem.steps)))
        gates = opened(problem)
        with evaluating(problem.net.model):
            found.append(sum((worth(problem.net, problem.spread, problem.valid[i], gates)
                              for i in range(batches)),
                             torch.zeros(len(problem.space), dtype=torch.float64)) / batches)
    score = found[0] if by != "both" else ranks(problem, found)
    return Ranking(score, problem.limits.fill(score, density=True))


def opened(problem: Problem) -> Tensor:
    """Gates (units,) that are all open, but for what is settled as pruned."""
    z = torch.ones(len(problem.space), device=problem.net.home)
    if problem.settled is not None:
        z[problem.space.prunes] = problem.settled[problem.space.prunes].to(z)
    return z


def learn(problem: Problem, steps: int) -> None:
    """Train all deltas and the head, at rates that suit so many."""
    optimizer = Learner(problem)
    optimizer.crowd(problem.crowd)
    loop = problem.loop(steps, weights=optimizer.weights, learn=optimizer)
    for step in loop:
        problem.net.z = opened(problem)
        loop.report(loss=descend(problem, problem.train[step], optimizer))


def ranks(problem: Problem, scores: Sequence[Tensor]) -> Tensor:
    """Scores whose order per parameter is that of the mean rank of the given ones; above 0."""
    cost = problem.space.cost.double().clamp(min=1)
    places = [(s / cost).argsort(stable=True).argsort(stable=True) + 1.0 for s in scores]
    return cost * sum(places, torch.zeros(len(cost), dtype=torch.float64)) / len(cost)

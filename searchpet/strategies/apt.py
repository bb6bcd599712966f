"""Prune while tuning, by salience: after APT, Zhao et al. 2024, arXiv:2401.12200.

One training, one pass a step.  The salience of a unit is |z dL/dz| on the training batch, smoothed
over steps; prune units leave in ten rounds on a cubic schedule, the least salient per unit of cost
first, for good.  At the end PET units are kept by salience per parameter.  Without a limit on
inference nothing leaves, and PET alone is chosen so.

Differences from the paper: salience is read at gates, not summed over activations times weights
with their kurtosis; ranks do not grow during the training, the budget is exact and spent at its
end; the structure is trained anew, as every one here.
"""

from __future__ import annotations

import torch

from searchpet.allocate import SCHEDULES
from searchpet.settle import compare
from searchpet.strategies import Learner, Problem, Ranking, law

TRAINS = True


def search(
    problem: Problem,
    *,
    smooth: float = 0.85,  # the paper's
    rounds: int = 10,  # the paper's
    begin: float = 0.1,  # share of the steps before the first round: deltas start silent
    end: float = 0.6,  # share of the steps at which the last unit has left
) -> Ranking:
    """Train with all PET open while prune units leave; keep what was salient.

    Raises InputError for a hyperparameter out of its range.
    """
    law("apt.smooth", smooth, 0 <= smooth < 1, "in [0, 1)")
    law("apt.rounds", rounds, rounds >= 1, "at least 1")
    law("apt.begin", begin, 0 <= begin <= end <= 1, "a share of the steps, at most apt.end")
    net, limits, device = problem.net, problem.limits, problem.net.home
    learn = Learner(problem)
    learn.crowd(problem.crowd)
    salience = torch.zeros(len(problem.space), dtype=torch.float64, device=device)
    keep = torch.ones(len(problem.space), dtype=torch.float64, device=device)
    start, stop = round(begin * problem.steps), round(end * problem.steps)
    every = max(1, (stop - start) // rounds)
    loop = problem.loop(
        problem.steps, salience=salience, keep=keep, weights=learn.weights, learn=learn)
    for step in loop:
        if start <= step <= stop and ((step - start) % every == 0 or step == stop):
            # the schedule's kept share runs from 1 to 0, so it is how far the limit is eased
            ease = SCHEDULES["cubic"](step, start, stop, 0.0)
            kept = limits.fill(compare(limits, salience.cpu(), "per_cost"), ease=ease)
            keep.copy_(torch.where(problem.space.prunes, kept, True))
        net.z = keep.float().requires_grad_()
        loss = problem.spread(problem.train[step])
        slope, *found = torch.autograd.grad(loss, [net.z, *learn.weights], materialize_grads=True)
        learn.follow(found)
        salience.lerp_((slope * net.z).abs().double(), 1 - smooth)
        loop.report(loss=loss.detach(), **problem.gauge(step, keep, limits.price(keep)))
    score = compare(limits, salience.cpu(), "per_cost")
    return Ranking(score, limits.fill(score, density=True))

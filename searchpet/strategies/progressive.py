"""Progressive: everything learns at first, then units are switched off until the budget is met.

A unit's importance is Fisher's information of its gate, F = E_rows[(dL_row/dz)^2], smoothed over
steps: half of it is, to second order and at a minimum, the loss that closing the gate costs (Theis
et al. 2018, Fisher pruning, arXiv:1801.05787).  Gates are given per row, all alike, so that one
pass has every row's slope beside the gradients of the deltas; |dL/dz| of the batch, the usual
estimate, vanishes where the deltas have learned their own size.

- The budget falls from everything to its value on a cubic schedule (Zhu and Gupta 2017,
  arXiv:1710.01878), in `rounds` rounds; each keeps the units of the greatest summed importance.
- A closed gate still has a slope, at what its delta had learned when it was closed; a unit whose
  slope grows, because others went, comes back.
- Batches come from both halves of the data in turn, and each half keeps an importance of its own;
  the mean of both counts, as in BIPEFT (Chang et al. 2024, arXiv:2410.09079), which weighs them by
  how far their gradients agree.  Nothing is held out.

One pass a step.  A search of --steps steps ends with the deltas of the kept units trained, and
`--inherit` starts from them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from searchpet.slopes import information
from searchpet.strategies import Learner, Problem, Ranking, law

PET_ALONE = True
TRAINS = True


def search(
    problem: Problem,
    *,
    warmup: float = 0.2,  # share of the steps in which everything stays on
    until: float = 0.8,  # share of the steps after which the budget is met
    rounds: int = 20,  # of switching off; each takes the exact knapsack
    smooth: float = 0.9,  # of the importance: it remembers ten steps of each half
) -> Ranking:
    """Learn with less and less, then keep the units of the greatest importance within the limit.

    Raises InputError for a hyperparameter out of its range.
    """
    law("progressive.warmup", warmup, 0 < warmup <= 1, "a share of the steps in (0, 1]")
    law("progressive.until", until, warmup <= until <= 1, "a share of the steps from warmup to 1")
    law("progressive.rounds", rounds, rounds >= 1, "at least 1")
    law("progressive.smooth", smooth, 0 <= smooth < 1, "in [0, 1)")
    net, limits, steps = problem.net, problem.limits, problem.steps
    learn = Learner(problem)
    size = sizes(problem, warmup, until, rounds)
    importance = torch.zeros(2, len(problem.space), dtype=torch.float64, device=net.home)
    on = limits.at(problem.space.total).fill(importance[0]).to(net.home)
    score = importance[0].clone()  # what `on` was chosen by
    loop = problem.loop(steps, importance=importance, on=on, score=score, weights=learn.weights,
                        learn=learn)
    changed = True
    for step in loop:
        if changed:
            learn.crowd(problem.crowd ** crowded(problem, on))
        half, used = step % 2, on.double()
        batch = (problem.train, problem.valid)[half][step // 2]
        loss, square, found = information(problem.net, problem.spread, batch, on, learn.weights)
        learn.follow(found)
        importance[half].lerp_(square, max(1 - smooth, 1 / (step // 2 + 1)))  # at first the mean
        changed = step + 1 in size
        if changed:
            score.copy_(importance.mean(0))
            on.copy_(limits.at(size[step + 1]).fill(score, density=True))
        loop.report(loss=loss, **problem.gauge(step, used, limits.price(used)))
    return Ranking(score.cpu(), on.cpu())


def sizes(problem: Problem, warmup: float, until: float, rounds: int) -> dict[int, int]:
    """Parameters that stay on, by how many steps are done; the last is the limit."""
    found, limit = {}, problem.limit
    for k in range(1, rounds + 1):
        done = round(problem.steps * (warmup + (until - warmup) * k / rounds))
        left = (1 - k / rounds) ** 3
        found[max(1, done)] = limit + int(max(0, problem.space.total - limit) * left)
    return found


def crowded(problem: Problem, on: Tensor) -> float:
    """How far what is on is above the limit: 0 at most that, 1 everything; in between by ratio."""
    above = problem.limits.parameters(on) / max(1, problem.limit)
    most = problem.space.total / max(1, problem.limit)
    return min(1.0, math.log(above) / math.log(most)) if above > 1 else 0.0

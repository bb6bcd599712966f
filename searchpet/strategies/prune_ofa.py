"""Prune once for all: masks by magnitude while PET learns, to be kept on every other task.

Zafrir et al. 2021, arXiv:2111.05754.  In each matrix the weights with the smallest |W + dW| go,
on the cubic schedule of Zhu and Gupta 2017, arXiv:1710.01878; the masks are final at `end` of the
steps, and PET units are then kept by |z dL/dz| per parameter.  The spec's masks are locked: train
it on another task, `searchpet train SPEC --task OTHER`, and they are the same bit for bit, and
their zeros are there after `merge(model, keep_zeros=True)`.  The paper's teacher is `--distill
full`, for the training after the search and for that on another task.

Differences from the paper: the backbone is frozen, so that a weight's magnitude moves with its
delta alone; pruned weights do not come back; the general corpus is whatever task is searched on;
rates are not rewound, the structure is trained anew.  Masks of units (attention heads, neurons)
take the same way, by the sum over what a unit takes out.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from searchpet.allocate import SCHEDULES
from searchpet.errors import InputError
from searchpet.importance import add_up
from searchpet.settle import compare
from searchpet.strategies import Problem, Ranking, law
from searchpet.tickets import Learner, linears, magnitudes

TRAINS = True
WEIGHTS = True  # chooses masks of single weights, if there are any
PRUNES = True  # needs masks and a limit on what they leave


def search(
    problem: Problem,
    *,
    allocation: str = "per_layer",  # the paper's: the same share of every matrix
    end: float = 0.625,  # share of the steps; the paper's 50 of 80 thousand
    rounds: int = 10,  # the paper has 50 in 250 times as many steps
    smooth: float = 0.85,  # of salience over steps, as in `apt`
) -> Ranking:
    """Prune to the limit on inference while PET learns, then keep PET units within theirs.

    Raises InputError where there is nothing to prune, for an unknown allocation, and for a
    hyperparameter out of its range.
    """
    law("prune_ofa.end", end, 0 <= end < 1, "a share of the steps in [0, 1)")
    law("prune_ofa.rounds", rounds, rounds >= 1, "at least 1")
    law("prune_ofa.smooth", smooth, 0 <= smooth < 1, "in [0, 1)")
    learner = Learner(problem.net, problem.rates, problem.crowd, smooth)
    gates = _prune(problem, learner, allocation, 1.0)
    stop = min(round(end * problem.steps), problem.steps - 1)
    cuts = {round(stop * i / rounds) for i in range(1, rounds + 1)}
    loop = problem.loop(problem.steps, gates=gates, **learner.state())
    for step in loop:
        ease = SCHEDULES["cubic"](step, 0, stop, 0.0)
        if step in cuts:
            _prune(problem, learner, allocation, ease)
        if step == stop:
            learner.salience.zero_()  # of what was there before the masks were final
        loop.report(loss=learner.step(problem.spread, problem.train[step]), ease=ease)
    limits = replace(problem, settled=learner.keep.cpu() > 0.5).limits
    score = learner.salience.cpu()
    return Ranking(score, limits.fill(score, density=True))


def _prune(problem: Problem, learner: Learner, allocation: str, ease: float) -> list[Tensor]:
    """Prune to the limit, relaxed by `ease`; the gates of single weights, if there are any."""
    found = magnitudes(problem.net)
    if problem.settle_weights is not None:
        return list(problem.settle_weights(found, allocation, (), ease=ease).gates.values())
    if problem.keep is None:
        raise InputError("prune_ofa prunes, but no limit on inference is given; add "
                         "--keep-weights 50% --masks prune/weights")
    space = problem.space
    score = add_up(found, linears(space), space)
    kept = problem.limits.fill(compare(problem.limits, score, allocation), ease=ease)
    learner.keep.copy_(torch.where(space.prunes, kept, True))
    return []

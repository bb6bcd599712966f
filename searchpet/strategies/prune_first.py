"""Prune, then search: units are removed by a score, then PET is searched on what is left.

The order of Shears (Munoz et al. 2024, arXiv:2404.10934), and a control that a joint search has to
beat.  `score` names any importance of prune units.  With `rounds` above 1 the limit comes down on
the cubic schedule of Zhu and Gupta 2017, arXiv:1710.01878, and what is left is scored anew in each
round; single weights that are gone do not come back.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from searchpet import catalog
from searchpet.allocate import SCHEDULES
from searchpet.errors import InputError
from searchpet.settle import compare
from searchpet.strategies import Problem, Ranking, law

TRAINS = True
WEIGHTS = True  # chooses masks of single weights, if there are any
PRUNES = True  # needs masks and a limit on what they leave


def search(
    problem: Problem,
    *,
    score: str = "wanda",  # cheap, and better than magnitude in every published comparison
    allocation: str = "",  # per_cost for units, which differ in size; for weights see Bulk.settle
    batches: int = 8,  # calibration batches; scores settle after a few
    rounds: int = 1,  # one shot; more cost a scoring each
    pet: str = "bilevel",  # the strategy that searches PET on what is left
) -> Ranking:
    """Keep prune units by score within the limit on inference, then PET units within theirs.

    Raises InputError where there is nothing to prune, and for an unknown score or allocation.
    """
    law("prune_first.batches", batches, batches >= 1, "at least 1")
    law("prune_first.rounds", rounds, rounds >= 1, "at least 1")
    if problem.settle_weights is None and problem.keep is None:
        raise InputError("prune_first prunes, but no limit on inference is given; add "
                         "--keep-flops 60%")
    calibration = [problem.train[i] for i in range(batches)]
    keep = torch.ones(len(problem.space), dtype=torch.bool)
    for number in range(1, rounds + 1):
        ease = SCHEDULES["cubic"](number, 0, rounds, 0.0)  # how far the limit is still relaxed
        if problem.settle_weights is not None:
            problem.settle_weights(score, allocation, calibration, ease=ease)
            continue
        problem.net.z = keep.float()
        found = compare(problem.limits, problem.importance(score, calibration),
                        allocation or "per_cost")
        keep = ~problem.space.prunes | problem.limits.fill(found, ease=ease)
    problem.net.z = torch.ones(len(problem.space))
    ranking: Ranking = catalog.get("strategies", pet)(replace(problem, settled=keep))
    return ranking

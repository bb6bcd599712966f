"""Prune, then search: units are removed by a score, then PET is searched on what is left.

The order of Shears (Munoz et al. 2024, arXiv:2404.10934), and a control that a joint search has to
beat.  `score` names any importance of prune units.
"""

from __future__ import annotations

from dataclasses import replace

from searchpet import catalog
from searchpet.errors import InputError
from searchpet.settle import settle
from searchpet.strategies import Problem, Ranking, law

TRAINS = True
PRUNES = True  # needs masks and a limit on what they leave

def search(
    problem: Problem,
    *,
    score: str = "wanda",  # cheap, and better than magnitude in every published comparison
    allocation: str = "",  # per_cost for units, which differ in size; for weights see Bulk.settle
    batches: int = 8,  # calibration batches; scores settle after a few
    pet: str = "bilevel",  # the strategy that searches PET on what is left
) -> Ranking:
    """Keep prune units by score within the limit on inference, then PET units within theirs.

    Raises InputError where there is nothing to prune, and for an unknown score or allocation.
    """
    law("prune_first.batches", batches, batches >= 1, "at least 1")
    calibration = [problem.train[i] for i in range(batches)]
    if problem.settle_weights is not None:
        problem.settle_weights(score, allocation, calibration)
        rest = problem
    elif problem.keep is not None:
        found = problem.importance(score, calibration)
        rest = replace(problem, settled=settle(problem.limits, found, allocation or "per_cost"))
    else:
        raise InputError("prune_first prunes, but no limit on inference is given; add "
                         "--keep-flops 60%")
    ranking: Ranking = catalog.get("strategies", pet)(rest)
    return ranking

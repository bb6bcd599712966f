"""Search PET on the whole model, then prune: the other order that a joint search has to beat.

PET is searched as if nothing were removed.  Prune units are then scored with the trained PET in
place, and the PET units whose hosts went are replaced by the next best on what is left.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from searchpet import catalog
from searchpet.errors import InputError
from searchpet.settle import settle
from searchpet.strategies import Problem, Ranking, law

TRAINS = True
PRUNES = True  # needs masks and a limit on what they leave


def search(
    problem: Problem,
    *,
    score: str = "gate",  # sees the trained PET; weights alone do not
    allocation: str = "per_cost",  # units differ in size, and removing them in what it saves
    batches: int = 8,  # calibration batches; scores settle after a few
    pet: str = "bilevel",  # the strategy that searches PET on the whole model
) -> Ranking:
    """PET units first, then the prune units within the limit on inference.

    Raises InputError where there is nothing to prune, and for an unknown score or allocation.
    """
    law("pet_first.batches", batches, batches >= 1, "at least 1")
    if problem.keep is None:
        raise InputError("pet_first prunes, but no limit on inference is given; add "
                         "--keep-flops 60%")
    everything = torch.ones(len(problem.space), dtype=torch.bool)
    found: Ranking = catalog.get("strategies", pet)(replace(problem, settled=everything))
    problem.net.z = torch.where(problem.space.prunes, 1.0, found.keep.float())
    scores = problem.importance(score, [problem.train[i] for i in range(batches)])
    limits = replace(problem, settled=settle(problem.limits, scores, allocation)).limits
    return Ranking(found.score, limits.fill(found.score, density=True))

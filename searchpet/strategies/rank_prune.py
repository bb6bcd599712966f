"""Rank pruning: singular directions of the matrices go by a score, PET is searched on the rest.

Xia & Shin 2021, arXiv:2112.05705, prune a factorised W = U diag(z) V by gates on its ranks.
Scores of a group of directions, per element that its factors cost:

- gate: |dL/dz|, the sum of s_i u_i^T G v_i over the group with G = dL/dW, mean over batches: how
  much the loss would change, to first order, so singular values weigh the gradient;
- energy: the sum of s_i^2: what the best approximation of each matrix by few ranks would keep.

Differences from the paper: the scores are taken once, gates are not trained (`bilevel` does so,
over the same masks); ranks are chosen in groups and over all matrices together; what a share means
is said in `searchpet.inference`; PET is tuned afterwards, not all weights.
"""

from __future__ import annotations

from searchpet import catalog
from searchpet.strategies import Problem, Ranking, law

TRAINS = True
PRUNES = True  # needs masks and a limit on what they leave
MASKS = "prune/ranks"  # what it prunes by, unless --masks says otherwise


def search(
    problem: Problem,
    *,
    score: str = "gate",  # or energy, which sees no data; any other importance of prune units
    allocation: str = "per_cost",  # a direction of a wide matrix costs more than one of a square
    batches: int = 8,  # calibration batches; scores settle after a few
    pet: str = "bilevel",  # the strategy that searches PET on what is left
) -> Ranking:
    """Keep directions by score within the limit on inference, then PET units within theirs.

    Raises InputError where there is nothing to prune, and for an unknown score or allocation.
    """
    law("rank_prune.batches", batches, batches >= 1, "at least 1")
    found: Ranking = catalog.get("strategies", "prune_first")(
        problem, score=score, allocation=allocation, batches=batches, pet=pet)
    return found

"""SparseAdapter: every module of the space, of whose weights the best scored stay at init.

He et al. 2022, arXiv:2210.04284.  The budget is the number of weights that stay, exactly; a larger
space at the same budget is the paper's Large-Sparse.  Differences: SNIP and Fisher are 0 on both
factors of a module that starts with one of them at zero, so they are taken after a warm-up; the
paper's repository starts from noise on both.
"""

from __future__ import annotations

import torch

from searchpet.errors import InputError
from searchpet.strategies import Problem, Ranking, law

TRAINS = False
CHOOSES = True  # parameters of PET, not units: its scores fill no other limit
PET_ALONE = True  # no masks of the backbone, no limit on inference
SPARSE = True  # keeps single parameters: what a law says of whole units does not hold


def search(
    problem: Problem,
    *,
    score: str = "snip",  # the paper's best; random, magnitude and grasp are its others, fisher
    # and movement ours
    allocation: str = "global",  # or per_layer, erdos_renyi
    batches: int = 8,  # calibration batches
    warmup: int = 10,  # steps before what is 0 at init is scored, two would do; those of movement
) -> Ranking:
    """Keep `limit` parameters of all that the space has.

    Raises InputError for a budget above that, and where prune masks are in the space.
    """
    law("sparse_adapter.batches", batches, batches >= 1, "at least 1")
    law("sparse_adapter.warmup", warmup, warmup >= 1, "at least 1")
    if problem.keep is not None or problem.settle_weights is not None:
        raise InputError("sparse_adapter thins PET alone, but masks of the backbone are asked for "
                         "too; drop --keep-flops or --keep-weights")
    assert problem.settle_pet is not None  # whoever makes a problem for it gives one
    problem.settle_pet(score, allocation, [problem.train[i] for i in range(batches)], warmup)
    keep = torch.ones(len(problem.space), dtype=torch.bool)
    return Ranking(keep.double(), keep)

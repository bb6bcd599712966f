"""-sum_t g_t * w_t: what training moves away from 0 stays.  Sanh et al. 2020, arXiv:2005.07683.

Movement pruning.  Scores are signed: negative ones are weights on their way to zero.  The paper's
factor, the learning rate, is left out: it is one number for the whole model.
"""

from __future__ import annotations

from torch import Tensor

from searchpet.scores import Stats, needs


@needs("moved")
def score(stats: Stats) -> Tensor:
    """The weight's shape."""
    assert stats.moved is not None  # what `needs` promises
    return stats.moved

"""w^2 * E[g^2]: the loss's second-order change when w goes.  Theis et al. 2018, arXiv:1801.05787.

Half of it is that change where the mean gradient is zero and the Hessian is the diagonal of the
empirical Fisher, E[g^2]; the half changes no order.  E is over batches: with one row in each it is
the Fisher information, with n rows about an n-th of it.
"""

from __future__ import annotations

from torch import Tensor

from searchpet.scores import Stats, needs


@needs("square")
def score(stats: Stats) -> Tensor:
    """The weight's shape."""
    assert stats.square is not None  # what `needs` promises
    return stats.weight.square() * stats.square

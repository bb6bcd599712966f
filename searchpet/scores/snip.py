"""|w * g|: the loss's change, to first order, when w goes.  Lee et al. 2019, arXiv:1810.02340.

The paper divides by the sum over the whole model: one number, which changes no order.  The same as
the first-order Taylor score of Molchanov et al. 2017, arXiv:1611.06440.  All scores are exactly 0
on PET factors of which one is zero at init: see `searchpet.scores.degenerate`.
"""

from __future__ import annotations

from torch import Tensor

from searchpet.scores import Stats, needs


@needs("grad")
def score(stats: Stats) -> Tensor:
    """The weight's shape."""
    assert stats.grad is not None  # what `needs` promises
    return (stats.weight * stats.grad).abs()

"""|w_ij| * ||x_j||: weights times the size of their inputs.  Sun et al. 2023, arXiv:2306.11695.

The paper compares weights within a row (an output) only: the allocation `per_row` of
`searchpet.allocate`.
"""

from __future__ import annotations

from torch import Tensor

from searchpet.scores import Stats, needs


@needs("norm")
def score(stats: Stats) -> Tensor:
    """The weight's shape."""
    assert stats.norm is not None  # what `needs` promises
    return stats.weight.abs() * stats.norm  # (d_out, d_in) * (d_in,)

"""|dW|: what training changed most stays.  Chen et al. 2023 (DSEE), arXiv:2111.00160.

Summed over the rows of an attention head in the query and the value it is the paper's score of
that head, from the update alone; with `magnitude` added to it, the paper's default.
"""

from __future__ import annotations

from torch import Tensor

from searchpet.scores import Stats, needs


@needs("update")
def score(stats: Stats) -> Tensor:
    """The weight's shape."""
    assert stats.update is not None  # what `needs` promises
    return stats.update.abs()

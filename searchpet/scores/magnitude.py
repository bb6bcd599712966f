"""|w|: small weights go.  Han et al. 2015, arXiv:1506.02626."""

from __future__ import annotations

from torch import Tensor

from searchpet.scores import Stats


def score(stats: Stats) -> Tensor:
    """The weight's shape."""
    return stats.weight.abs()

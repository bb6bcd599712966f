"""u, uniform in [0, 1): the control that every score must beat.  He et al. 2022, arXiv:2210.04284.

SparseAdapter draws from a normal distribution; the order of the weights is as random.
"""

from __future__ import annotations

import torch
from torch import Tensor

from searchpet.scores import Stats, needs


@needs("generator")
def score(stats: Stats) -> Tensor:
    """The weight's shape; draws from `generator`, so two calls differ and a seed repeats them."""
    assert stats.generator is not None  # what `needs` promises
    draw = torch.rand(stats.weight.shape, generator=stats.generator,
                      device=stats.generator.device)
    return draw.to(stats.weight.device)

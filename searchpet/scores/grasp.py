"""w * (H g): the gradient flow that is lost when w goes.  Wang et al. 2020, arXiv:2002.07376.

Removing weight i turns |g|^2 into |g|^2 - 2 w_i (H g)_i, to first order.  The paper scores
S = -w * (H g) and removes the *highest* S; here the sign is turned, so that the highest stay.
Scores are signed: negative ones are weights whose removal makes the gradient larger.
The paper's temperature on the logits (200) is left to the loss.
"""

from __future__ import annotations

from torch import Tensor

from searchpet.scores import Stats, needs


@needs("hessian_grad")
def score(stats: Stats) -> Tensor:
    """The weight's shape."""
    assert stats.hessian_grad is not None  # what `needs` promises
    return stats.weight * stats.hessian_grad

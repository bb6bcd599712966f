"""|G * (W + s B A)|, G = s (gB A + B gA - gB gA): Zhang et al. 2023, arXiv:2305.18403.

LoRAPrune: SNIP on the merged weight, without the weight's own gradient, which a frozen W has not.
The LoRA's factors have gradients gA (r, d_in) and gB (d_out, r); a step of size e along them moves
the merged weight by

    s (B - e gB)(A - e gA) - s B A = - e s (gB A + B gA - e gB gA),

as a step of the same size on W would if its gradient were G = s (gB A + B gA - e gB gA).  The
paper takes e = 1, and so does this file; the paper's G lacks s, one number per LoRA, and its score
is the square.  At B = 0, G = s gB A is not zero: this score needs no warm-up.
"""

from __future__ import annotations

from torch import Tensor

from searchpet.scores import Stats, needs


@needs("low_rank")
def score(stats: Stats) -> Tensor:
    """(d_out, d_in)."""
    assert stats.low_rank is not None  # what `needs` promises
    A, B, grad_A, grad_B, s = stats.low_rank
    gradient = s * (grad_B @ A + B @ grad_A - grad_B @ grad_A)
    return (gradient * (stats.weight + s * B @ A)).abs()

"""Matrix: y + z dW x, a full update of the site's weight that starts at zero.

It is there to be thinned: a mask over its parameters (`searchpet.sparse`) leaves the sparse part S
of DSEE (Chen et al. 2023, arXiv:2111.00160), of which only the kept numbers train, count and are
stored.  The paper scales S by LoRA's alpha / r, which a calibrated learning rate cancels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from searchpet.deltas import Affine, Delta, each
from searchpet.site import Site


class Matrix(Delta):
    """The one coordinate is the whole matrix, its cost d_in * d_out."""

    atoms = True  # no output channel of its own, which pruning could take away alone

    @classmethod
    def fits(cls, site: Site) -> bool:
        return site.form == "linear"

    def __init__(self, site: Site) -> None:
        super().__init__(width=1)
        self.site = site
        self.matrix = nn.Parameter(torch.zeros(site.d_out, site.d_in))

    def cost(self) -> Tensor:
        return each(self.width, self.site.d_in * self.site.d_out)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return F.linear(x, self.matrix) * z  # (..., d_in) -> (..., d_out), z (..., 1)

    def affine(self, z: Tensor) -> Affine:
        return Affine(M=self.matrix * z)

    def thin(self, keep: Tensor) -> Matrix:
        assert bool(keep.all())  # a delta that keeps nothing is none
        copy = Matrix(self.site)
        copy.matrix = nn.Parameter(self.matrix.detach().clone())
        return copy


KIND = Matrix

"""Low-rank adapter: y + z (U act(D y + d) + u), D = p q^T and U = v w^T of rank 1.

Compacter's low-rank variant (Karimi Mahabadi et al. 2021, arXiv:2106.04647) as S3PET uses it (Hu
et al. 2022, arXiv:2206.07382): one unit per block, 2 (d + m) + m + d parameters with m = d /
`reduction`.  Difference: the last factor starts at zero, so the adapter is silent at init;
`glorot=True` restores the authors' initialisation of all four factors.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from searchpet.deltas import Delta, each
from searchpet.site import Site


class LowrankAdapter(Delta):
    """One coordinate: the adapter as a whole."""

    stage = "sequential"

    @classmethod
    def fits(cls, site: Site) -> bool:
        return site.form == "block"

    def __init__(
        self,
        site: Site,
        *,
        reduction: int = 32,  # S3PET's: m = 32 at the width of T5-large, 1024
        glorot: bool = False,  # True is the authors' init, at which it is not silent
    ) -> None:
        super().__init__(width=1)
        self.options: dict[str, Any] = {"reduction": reduction, "glorot": glorot}
        self.site = site
        d, m = site.d_out, max(1, site.d_out // reduction)
        self.down_in = nn.Parameter(torch.empty(d))
        self.down_out = nn.Parameter(torch.empty(m))
        self.down_bias = nn.Parameter(torch.zeros(m))
        self.up_in = nn.Parameter(torch.empty(m))
        self.up_out = nn.Parameter(torch.zeros(d))
        self.up_bias = nn.Parameter(torch.zeros(d))
        for factor in (self.down_in, self.down_out, self.up_in):
            _glorot(factor)
        if glorot:
            _glorot(self.up_out)

    def cost(self) -> Tensor:
        return each(1, sum(p.numel() for p in self.parameters()))

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        h = (y @ self.down_in).unsqueeze(-1) * self.down_out + self.down_bias  # (..., m)
        a = (F.gelu(h) @ self.up_in).unsqueeze(-1) * z  # (..., 1)
        return a * self.up_out + z * self.up_bias  # (..., d_out)

    def thin(self, keep: Tensor) -> LowrankAdapter:
        if not bool(keep.all()):
            raise ValueError("a low-rank adapter has one coordinate and cannot be thinned to none")
        thinner = LowrankAdapter(self.site, **self.options)
        thinner.load_state_dict(self.state_dict())
        return thinner


def _glorot(factor: Tensor) -> None:
    """Glorot uniform with gain sqrt(2) for a vector seen as a (n, 1) matrix."""
    bound = math.sqrt(2) * math.sqrt(6.0 / (factor.numel() + 1))
    nn.init.uniform_(factor, -bound, bound)


KIND = LowrankAdapter

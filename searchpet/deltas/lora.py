"""LoRA: y + s B diag(z) A x, s = alpha / r.  Hu et al. 2021, arXiv:2106.09685, eq. 3.

A rank-r LoRA is r independent rank-1 atoms, so a search over atoms is a search over ranks.
`rank_stabilised` uses s = alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732).  s is fixed by
the rank asked for, not by the atoms kept, so removing an atom does not change the others.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from searchpet.deltas import Affine, Delta, each
from searchpet.site import Site


class Lora(Delta):
    """A coordinate is a rank-1 atom, its cost d_in + d_out.  B is zero at init: silent."""

    atoms = True

    @classmethod
    def fits(cls, site: Site) -> bool:
        return site.form == "linear"

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 1,  # S3PET's; more atoms on a site are for larger budgets
        alpha: float = 16.0,  # S3PET's; the calibrated learning rate cancels it
        rank_stabilised: bool = False,  # the first paper's; True where ranks are high
    ) -> None:
        super().__init__(width=rank)
        self.options: dict[str, Any] = {
            "rank": rank, "alpha": alpha, "rank_stabilised": rank_stabilised}
        self.site = site
        self.scaling = alpha / (math.sqrt(rank) if rank_stabilised else rank)
        self.A = nn.Parameter(torch.empty(rank, site.d_in))
        self.B = nn.Parameter(torch.zeros(site.d_out, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def cost(self) -> Tensor:
        return each(self.width, self.site.d_in + self.site.d_out)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        h = F.linear(x, self.A) * (z * self.scaling)  # (..., d_in) -> (..., r)
        return F.linear(h, self.B)  # (..., r) -> (..., d_out)

    def affine(self, z: Tensor) -> Affine:
        return Affine(M=(self.B * (z * self.scaling)) @ self.A)

    def thin(self, keep: Tensor) -> Lora:
        thinner = Lora(self.site, **self.options)  # same scaling
        thinner.width = int(keep.sum())
        thinner.A = nn.Parameter(self.A.detach()[keep].clone())
        thinner.B = nn.Parameter(self.B.detach()[:, keep].clone())
        return thinner


KIND = Lora

"""Bottleneck adapter: y + s U (z * act(D x + d)).  Houlsby et al. 2019, arXiv:1902.00751.

`stage` sequential: x is the block's output (Houlsby, Pfeiffer); parallel: x is the block's input
(He et al. 2022, arXiv:2110.04366, "scaled parallel adapter", whose s = 4 is the `scaling` option).
Differences from the papers: U starts at zero, so the adapter is silent at init, and has no bias,
so that every bottleneck unit stands alone; the kind `bias` provides one.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from searchpet.deltas import Delta, each
from searchpet.site import Site

Place = Literal["parallel", "sequential"]


class Adapter(Delta):
    """A coordinate is a bottleneck unit; its cost is its row of D, its bias, its column of U."""

    atoms = True

    @classmethod
    def fits(cls, site: Site) -> bool:
        return site.form == "block"

    def __init__(
        self,
        site: Site,
        *,
        bottleneck: int = 8,  # units to choose from; a search keeps some of them
        stage: Place = "sequential",  # Houlsby's and Pfeiffer's; parallel is He et al.'s
        scaling: float = 1.0,  # He et al. take 4; the calibrated learning rate cancels it
    ) -> None:
        super().__init__(width=bottleneck)
        self.options: dict[str, Any] = {
            "bottleneck": bottleneck, "stage": stage, "scaling": scaling}
        self.site, self.stage, self.scaling = site, stage, scaling
        d_from = site.d_in if stage == "parallel" else site.d_out
        self.D = nn.Parameter(torch.empty(bottleneck, d_from))
        self.d = nn.Parameter(torch.zeros(bottleneck))
        self.U = nn.Parameter(torch.zeros(site.d_out, bottleneck))
        nn.init.kaiming_uniform_(self.D, a=math.sqrt(5))

    def cost(self) -> Tensor:
        return each(self.width, self.D.shape[1] + 1 + self.site.d_out)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        h = F.gelu(F.linear(x if self.stage == "parallel" else y, self.D, self.d))
        return F.linear(h * (z * self.scaling), self.U)  # (..., m) -> (..., d_out)

    def thin(self, keep: Tensor) -> Adapter:
        thinner = Adapter(self.site, **self.options)
        thinner.width = int(keep.sum())
        thinner.D = nn.Parameter(self.D.detach()[keep].clone())
        thinner.d = nn.Parameter(self.d.detach()[keep].clone())
        thinner.U = nn.Parameter(self.U.detach()[:, keep].clone())
        return thinner


KIND = Adapter

"""Sublayers: y <- z * y on the output of attention or feed-forward, before the residual addition.

z = 0 takes the whole sublayer out: the residual stream passes it by.  CoFi's z_MHA and z_FFN
(Xia et al. 2022, arXiv:2204.00408).
"""

from __future__ import annotations

from torch import Tensor

from searchpet.deltas import Groups, Mask, Stage
from searchpet.site import Site


class Sublayers(Mask):
    """One gate for all."""

    stage: Stage = "output"

    @classmethod
    def fits(cls, site: Site) -> bool:
        return site.form == "block"

    def __init__(self, site: Site, *, channels: Groups | None = None) -> None:
        if channels is None:
            channels = Groups(site.d_out, site.d_out)
        super().__init__(site, channels)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return (self.groups.at(z) - 1) * y  # (..., d_out)


KIND = Sublayers

"""Sublayers: y <- z * y on the output of attention or feed-forward, before the residual addition.

z = 0 takes the whole sublayer out: the residual stream passes it by.  CoFi's z_MHA and z_FFN
(Xia et al. 2022, arXiv:2204.00408).
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from searchpet.deltas import Delta, Groups, Stage, each
from searchpet.site import Site


class Sublayers(Delta):
    """One gate for all; no parameters, neutral at 1."""

    stage: Stage = "output"
    neutral: ClassVar[float] = 1.0

    @classmethod
    def fits(cls, site: Site) -> bool:
        return site.form == "block"

    def __init__(self, site: Site, *, channels: Groups | None = None) -> None:
        if channels is None:
            channels = Groups(site.d_out, site.d_out)
        super().__init__(width=len(channels), run=channels.each)
        self.site = site
        self.groups = channels

    def cost(self) -> Tensor:
        return each(self.width, 0)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return (self.groups.at(z) - 1) * y  # (..., d_out)

    def thin(self, keep: Tensor) -> Sublayers:
        return Sublayers(self.site, channels=self.groups.thin(keep))


KIND = Sublayers

"""Layers: y <- x + z (y - x) on a whole block; z = 0 takes the layer out: its input passes by.

Layer dropping (Fan et al. 2019, arXiv:1909.11556; Sajjad et al. 2020, arXiv:2004.03844), gated.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from searchpet.deltas import Delta, Groups, Stage, each
from searchpet.site import Site


class Layers(Delta):
    """One gate for the layer; no parameters, neutral at 1."""

    stage: Stage = "output"
    neutral: ClassVar[float] = 1.0

    @classmethod
    def fits(cls, site: Site) -> bool:
        return site.form == "layer"

    def __init__(self, site: Site, *, channels: Groups | None = None) -> None:
        if channels is None:
            channels = Groups(site.d_out, site.d_out)
        super().__init__(width=len(channels), run=channels.each)
        self.site = site
        self.groups = channels

    def cost(self) -> Tensor:
        return each(self.width, 0)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return (self.groups.at(z) - 1) * (y - x)  # (..., d_out)

    def thin(self, keep: Tensor) -> Layers:
        return Layers(self.site, channels=self.groups.thin(keep))


KIND = Layers

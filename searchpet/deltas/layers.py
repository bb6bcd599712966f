"""Layers: y <- x + z (y - x) on a whole block; z = 0 takes the layer out: its input passes by.

Layer dropping (Fan et al. 2019, arXiv:1909.11556; Sajjad et al. 2020, arXiv:2004.03844), gated.
"""

from __future__ import annotations

from torch import Tensor

from searchpet.deltas import Groups, Mask, Stage
from searchpet.site import Site


class Layers(Mask):
    """One gate for the layer."""

    stage: Stage = "output"

    @classmethod
    def fits(cls, site: Site) -> bool:
        return site.form == "layer"

    def __init__(self, site: Site, *, channels: Groups | None = None) -> None:
        if channels is None:
            channels = Groups(site.d_out, site.d_out)
        super().__init__(site, channels)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return (self.groups.at(z) - 1) * (y - x)  # (..., d_out)


KIND = Layers

"""Weights: W <- W * z, single elements of a weight matrix.

Unstructured pruning (Han et al. 2015, arXiv:1506.02626).  It saves no time on ordinary hardware:
masked weights cost as much as others.  Kept elements are counted in rows, (d_out, d_in).
"""

from __future__ import annotations

from torch import Tensor

from searchpet.deltas import Groups, Mask, Stage
from searchpet.site import Site


class Weights(Mask):
    """One gate per element."""

    stage: Stage = "weight"

    @classmethod
    def fits(cls, site: Site) -> bool:
        return site.form == "linear"

    def __init__(self, site: Site, *, channels: Groups | None = None) -> None:
        if channels is None:
            channels = Groups(site.d_out * site.d_in, 1)
        super().__init__(site, channels)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return (self.groups.at(z).view_as(x) - 1) * x  # x is W (d_out, d_in)


KIND = Weights

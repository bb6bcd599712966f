"""Neurons: x <- x * z at the feed-forward's second matrix; z = 0 takes hidden neurons out.

A coordinate is a group of neighbouring neurons, so that a layer has at most `most` of them and
every remaining width is a multiple of `multiple`, which matrix kernels like.  In a gated
feed-forward the product of both branches is gated.  The mask of CoFi's intermediate dimension
(Xia et al. 2022, arXiv:2204.00408), in groups.
"""

from __future__ import annotations

from torch import Tensor

from searchpet.deltas import Groups, Mask
from searchpet.site import Site


class Neurons(Mask):
    """One gate per group of neurons."""

    @classmethod
    def fits(cls, site: Site) -> bool:
        return site.form == "linear" and site.role == "ffn.out"

    def __init__(
        self,
        site: Site,
        *,
        most: int = 64,  # groups in a layer; more gates are noisier and cut no finer in practice
        multiple: int = 8,  # of neurons in a group; half a vector register or a tensor-core tile
        channels: Groups | None = None,
    ) -> None:
        size = -(-site.d_in // (most * multiple)) * multiple
        if channels is None:
            channels = Groups(site.d_in, size)
        super().__init__(site, channels, most=most, multiple=multiple)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return (self.groups.at(z) - 1) * x  # (..., d_in)


KIND = Neurons

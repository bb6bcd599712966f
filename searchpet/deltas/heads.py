"""Heads: x <- x * z at the attention's output projection; z = 0 takes an attention head out.

A coordinate is a key-value head with all query heads that read it: the smallest part that can
really be removed (under grouped-query attention several query heads, else one).  Gating the input
of the output projection equals zeroing its columns.  Michel et al. 2019, arXiv:1905.10650, gate
the same place.
"""

from __future__ import annotations

from torch import Tensor

from searchpet.deltas import Groups, Mask
from searchpet.site import Site


class Heads(Mask):
    """One gate per key-value head."""

    @classmethod
    def fits(cls, site: Site) -> bool:
        return (site.form == "linear" and site.role.endswith("attention.output")
                and bool(site.kv_heads) and site.d_in % (site.kv_heads or 1) == 0)

    def __init__(self, site: Site, *, channels: Groups | None = None) -> None:
        if channels is None:
            channels = Groups(site.d_in, site.d_in // (site.kv_heads or 1))
        super().__init__(site, channels)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return (self.groups.at(z) - 1) * x  # (..., d_in)


KIND = Heads

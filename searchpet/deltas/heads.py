"""Heads: x <- x * z at the attention's output projection; z = 0 takes an attention head out.

A coordinate is a key-value head with all query heads that read it: the smallest part that can
really be removed (under grouped-query attention several query heads, else one).  Gating the input
of the output projection equals zeroing its columns.  Michel et al. 2019, arXiv:1905.10650, gate
the same place.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from searchpet.deltas import Delta, Groups, Stage, each
from searchpet.site import Site


class Heads(Delta):
    """One gate per key-value head; no parameters, neutral at 1."""

    stage: Stage = "input"
    neutral: ClassVar[float] = 1.0

    @classmethod
    def fits(cls, site: Site) -> bool:
        return (site.form == "linear" and site.role.endswith("attention.output")
                and bool(site.kv_heads) and site.d_in % (site.kv_heads or 1) == 0)

    def __init__(self, site: Site, *, channels: Groups | None = None) -> None:
        if channels is None:
            channels = Groups(site.d_in, site.d_in // (site.kv_heads or 1))
        super().__init__(width=len(channels), run=channels.each)
        self.site = site
        self.groups = channels

    def cost(self) -> Tensor:
        return each(self.width, 0)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return (self.groups.at(z) - 1) * x  # (..., d_in)

    def thin(self, keep: Tensor) -> Heads:
        return Heads(self.site, channels=self.groups.thin(keep))


KIND = Heads

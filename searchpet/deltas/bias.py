"""BitFit: y + z * b.  Ben Zaken et al. 2022, arXiv:2106.10199.

Where the layer has no bias of its own (T5, LLaMA) this creates one.
"""

from __future__ import annotations

from torch import Tensor

from searchpet.deltas import Affine, Channels, Delta, each
from searchpet.site import Site


class Bias(Delta):
    """One bias per output channel; a coordinate is a channel, its cost one parameter."""

    pointwise = True

    @classmethod
    def fits(cls, site: Site) -> bool:
        return site.form in ("linear", "norm")

    def __init__(self, site: Site, *, channels: Channels | None = None) -> None:
        channels = channels or Channels(site.d_out)
        super().__init__(width=len(channels.value))
        self.site = site
        self.bias = channels

    def cost(self) -> Tensor:
        return each(self.width, 1)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        bias: Tensor = self.bias(z)
        return bias.expand_as(y)  # (d_out,) -> (..., d_out)

    def affine(self, z: Tensor) -> Affine:
        return Affine(c=self.bias(z))

    def thin(self, keep: Tensor) -> Bias:
        return Bias(self.site, channels=self.bias.thin(keep))


KIND = Bias

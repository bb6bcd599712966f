"""Scale: y + z * g * y, the learned rescaling of IA3 (Liu et al. 2022, arXiv:2205.05638).

Differences from the paper: g starts at 0 and 1 + g plays the role of its l; any linear or norm
may be scaled, not only key, value and the feed-forward hidden vector.  On a norm with a bias,
(1 + g) * (w * xhat + b) is a reparametrisation of norm tuning, w' = (1 + g) w, b' = (1 + g) b.
"""

from __future__ import annotations

from torch import Tensor

from searchpet.deltas import Affine, Channels, Delta, each
from searchpet.site import Site


class Scale(Delta):
    """One factor per output channel; a coordinate is a channel, its cost one parameter."""

    pointwise = True

    @classmethod
    def fits(cls, site: Site) -> bool:
        return site.form in ("linear", "norm")

    def __init__(self, site: Site, *, channels: Channels | None = None) -> None:
        channels = channels or Channels(site.d_out)
        super().__init__(width=len(channels.value))
        self.site = site
        self.scale = channels

    def cost(self) -> Tensor:
        return each(self.width, 1)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        scale: Tensor = self.scale(z)
        return scale * y  # (d_out,) * (..., d_out)

    def affine(self, z: Tensor) -> Affine:
        return Affine(g=self.scale(z))

    def thin(self, keep: Tensor) -> Scale:
        return Scale(self.site, channels=self.scale.thin(keep))


KIND = Scale

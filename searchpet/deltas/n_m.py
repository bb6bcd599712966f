"""N:M: W <- W * z with n of every m neighbours in a row kept; 2:4 is what GPUs speed up.

Mishra et al. 2021, arXiv:2104.08378.  The count is a law of a finished mask, which
whoever makes or loads one checks (`searchpet.masks.legal_n_m`); gates of a search may be anything.
"""

from __future__ import annotations

from torch import Tensor

from searchpet.deltas import Groups, Mask, Stage
from searchpet.errors import InputError
from searchpet.site import Site


class NM(Mask):
    """One gate per element."""

    stage: Stage = "weight"

    @classmethod
    def fits(cls, site: Site) -> bool:
        return site.form == "linear"

    def __init__(
        self,
        site: Site,
        *,
        n: int = 2,  # 2 of 4 is what GPUs speed up
        m: int = 4,  # neighbours in a row, of which n stay
        channels: Groups | None = None,
    ) -> None:
        if not 0 < n <= m:
            raise InputError(f"n of m weights stay, so n must be in 1 to {m}, but got {n}:{m}")
        if site.d_in % m:
            raise InputError(f"{n}:{m} needs rows of a multiple of {m}, but {site.path} has rows "
                             f"of {site.d_in}; select other sites or another m")
        if channels is None:
            channels = Groups(site.d_out * site.d_in, 1)
        super().__init__(site, channels, n=n, m=m)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return (self.groups.at(z).view_as(x) - 1) * x  # x is W (d_out, d_in)


KIND = NM

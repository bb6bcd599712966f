"""Blocks: W <- W * z, tiles of r x c elements of a weight matrix.

Block-sparse kernels need them; on their own they save no time (Lagunas et al. 2021,
arXiv:2109.04838, who train such masks by movement).
"""

from __future__ import annotations

from torch import Tensor

from searchpet.deltas import Groups, Mask, Stage
from searchpet.errors import InputError
from searchpet.site import Site


class Blocks(Mask):
    """One gate per tile, row by row."""

    stage: Stage = "weight"

    @classmethod
    def fits(cls, site: Site) -> bool:
        return site.form == "linear"

    def __init__(
        self,
        site: Site,
        *,
        rows: int = 1,  # x 4 columns: what torch's block sparsity takes
        columns: int = 4,  # with rows, a tile; the matrix must be a whole number of them
        channels: Groups | None = None,
    ) -> None:
        if site.d_out % rows or site.d_in % columns:
            raise InputError(f"blocks of {rows} x {columns} must tile a matrix of {site.d_out} x "
                             f"{site.d_in}, that of {site.path}; take divisors")
        if channels is None:
            channels = Groups(site.d_out // rows * (site.d_in // columns), 1)
        super().__init__(site, channels, rows=rows, columns=columns)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        rows, columns = self.options["rows"], self.options["columns"]
        tiles = self.groups.at(z).view(len(x) // rows, -1)  # (d_out / r, d_in / c)
        mask = tiles.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        return (mask - 1) * x  # x is W (d_out, d_in)


KIND = Blocks

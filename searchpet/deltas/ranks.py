"""Ranks: W <- U diag(s z) V^T, groups of singular directions of a pretrained weight.

Rank pruning of Xia & Shin 2021, arXiv:2112.05705: gates on the ranks of a factorised W.  With
U diag(s) V^T = W, masking is a projection: what is taken away is U diag(1 - z) U^T W, so that
nothing at all is where z = 1.  A matrix of rank k costs k (d_in + d_out) numbers as two factors;
`searchpet.inference` prices it so, and removal really puts two smaller matrices in its place.

A coordinate is a group of neighbouring directions, the largest singular values first, so that a
matrix has at most `most` of them.  The directions are those of the weight that the delta sees
first, which is the pretrained one: hooking in shows it, and it is frozen.  They are computed in
float64 on the CPU with signs fixed, so the same file of weights gives the same directions.
Directions of equal singular values are any rotation of each other: pretrained weights have none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from searchpet.deltas import Groups, Mask, Stage
from searchpet.site import Site


class Ranks(Mask):
    """One gate per group of directions.

    basis: (min(d_out, d_in), the smaller of d_out and d_in), orthonormal rows: U^T, or V^T where
    the weight is wide;  energy: squared singular values.  None until a weight was seen.
    """

    stage: Stage = "weight"
    atoms = True
    basis: Tensor | None
    energy: Tensor | None

    @classmethod
    def fits(cls, site: Site) -> bool:
        return site.form == "linear"

    def __init__(
        self,
        site: Site,
        *,
        most: int = 48,  # groups in a matrix: of 8 directions at a width of 384, of 16 at 768
        channels: Groups | None = None,
    ) -> None:
        rank = min(site.d_out, site.d_in)
        if channels is None:
            channels = Groups(rank, -(-rank // most))
        super().__init__(site, channels, most=most)
        self.register_buffer("basis", None, persistent=False)
        self.register_buffer("energy", None, persistent=False)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        if self.basis is None:
            self._look(x)
        assert self.basis is not None
        lost = (1 - self.groups.at(z)).unsqueeze(-1)  # (r, 1)
        with torch.autocast(x.device.type, enabled=False):  # it would cost half of W's digits
            weight = x.to(self.basis.dtype)  # (d_out, d_in)
            if len(x) <= x.shape[1]:  # (d_out, r) (r, d_out) (d_out, d_in)
                return -(self.basis.T @ (lost * (self.basis @ weight)))
            return -((weight @ self.basis.T) @ (lost * self.basis))  # by the other side

    def _look(self, weight: Tensor) -> None:
        """Take the directions of a weight (d_out, d_in)."""
        U, s, V = directions(weight)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        basis = U.T if weight.shape[0] <= weight.shape[1] else V
        self.basis = basis.to(weight.device, dtype).contiguous()
        self.energy = s.square().to(weight.device, dtype)  # not every device has float64

    def energies(self) -> Tensor:
        """Squared singular values of each coordinate, float64 (width,), on the CPU.

        What a coordinate takes away of the squared norm of the weight.
        """
        assert self.energy is not None  # hooked in: a weight was seen
        where = torch.arange(len(self.energy)) // self.groups.each
        total = torch.zeros(self.groups.count, dtype=torch.float64)
        total.index_add_(0, where, self.energy.cpu().double())
        return total if self.groups.index is None else total[self.groups.index.cpu()]


@torch.no_grad()
def directions(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (d_out, r), s (r,), V (r, d_in) of a weight (d_out, d_in), r the smaller of both.

    float64, on the CPU, s falling; the largest entry of each column of U is above 0.
    """
    U, s, V = torch.linalg.svd(weight.detach().cpu().double(), full_matrices=False)
    sign = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()  # (1, r)
    return U * sign, s, V * sign.T


KIND = Ranks

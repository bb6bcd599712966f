"""Updates: the backbone's matrices under PET.  What they are, what PET adds to them, and which of
their elements a low rank does not explain.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from searchpet.allocate import top
from searchpet.errors import InputError
from searchpet.factors import matrix_of as whole_matrix
from searchpet.factors import rows_of
from searchpet.site import Site
from searchpet.supernet import Supernet


class Parts(NamedTuple):
    """W = low + sparse + what neither explains; all (d_out, d_in) float64."""

    low: Tensor
    sparse: Tensor


def low_rank_sparse(weight: Tensor, rank: int, entries: int, rounds: int = 8) -> Parts:
    """Split weight (d_out, d_in) into a part of rank <= `rank` and one of `entries` elements.

    Alternately low = U V, U = qr((W - S) V^T), V = U^T (W - S), and S = the `entries` largest of
    W - U V by magnitude; `rounds` times at each rank, which grows by the longest row of what is
    left.  The greedy bilateral scheme of Zhou and Tao 2013 (AISTATS) with the limit on the number
    of entries of their GoDec (ICML 2011); fewer than 8 rounds miss planted entries.
    Deterministic.
    Raises InputError unless 0 < rank < both sides and 0 < entries <= the elements.
    """
    if not 0 < rank < min(weight.shape):
        raise InputError(f"the rank of a low-rank part must be in [1, {min(weight.shape) - 1}] "
                         f"for a matrix {tuple(weight.shape)}, but got {rank}")
    if not 0 < entries <= weight.numel():
        raise InputError(f"a sparse part must have from 1 to {weight.numel():,} entries for a "
                         f"matrix {tuple(weight.shape)}, but got {entries:,}")
    whole = weight.detach().cpu().double()
    low, sparse = torch.zeros_like(whole), torch.zeros_like(whole)
    rows = whole.new_zeros(0, whole.shape[1])
    for _ in range(rank):
        rest = whole - low - sparse
        longest = rest.square().sum(1).argmax()
        rows = torch.cat([rows, rest[longest].unsqueeze(0)])  # (r, d_in)
        for _ in range(rounds):
            basis, _ = torch.linalg.qr((whole - sparse) @ rows.T)  # (d_out, r)
            rows = basis.T @ (whole - sparse)
            low = basis @ rows
            rest = whole - low
            sparse = torch.where(top(rest.abs(), entries), rest, 0.0)
    return Parts(low, sparse)


def matrix_of(model: nn.Module, site: Site) -> Tensor:
    """The weight at a linear site (d_out, d_in), a copy; of a fused module its rows."""
    return whole_matrix(model.get_submodule(site.path))[rows_of(site)]


@torch.no_grad()
def updates(net: Supernet) -> dict[Site, Tensor]:
    """What the supernet's PET adds to the weight of each linear, all gates open: (d_out, d_in).

    Of kinds that add a matrix, as LoRA does; the others are left out.
    """
    found: dict[Site, Tensor] = {}
    for graft in net.grafts.grafts:
        if graft.delta.neutral == 1 or graft.site.form != "linear":
            continue
        device = next(graft.delta.parameters()).device
        affine = graft.delta.affine(torch.ones(graft.delta.width, device=device))
        if affine is not None and affine.M is not None:
            so_far = found.get(graft.site)
            found[graft.site] = affine.M if so_far is None else so_far + affine.M
    return found

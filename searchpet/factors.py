"""Factors: a linear as two smaller ones, of the singular directions that are left of its matrix.

W = U diag(s) V with k directions left costs k (d_in + d_out) numbers.  A fused projection has
directions part by part, so it becomes one pair of factors for each part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from searchpet.deltas.ranks import directions
from searchpet.errors import InputError
from searchpet.site import Site
from searchpet.slices import Edits, plain

Ranks = Mapping[tuple[str, str], Sequence[int]]  # path, role -> directions that stay


class Part(NamedTuple):
    """Some outputs of a linear: `size` of them, by `rank` directions; None: by a whole matrix."""

    size: int
    rank: int | None


class Factored(nn.Linear):
    """y = B A x + b, part by part.  It is a linear to whoever asks for sizes, not for its matrix.

    weight: (1, n), the numbers of all parts one after another: A (rank, d_in) and B (size, rank),
    or the whole matrix (size, d_in).  order (d_out,): where each output is in the parts' outputs,
    None for where it belongs.
    """

    order: Tensor | None

    def __init__(self, d_in: int, parts: Sequence[Part], weight: nn.Parameter,
                 bias: nn.Parameter | None, order: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = d_in, sum(part.size for part in parts)
        self.parts, self.weight = tuple(parts), weight
        self.register_parameter("bias", bias)
        self.register_buffer("order", order, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """x (..., d_in) -> (..., d_out)."""
        alone = self.bias if self.order is None and len(self.parts) == 1 else None
        found, start = [], 0
        for size, rank in self.parts:
            hidden = input
            if rank is not None:
                A, start = self._matrix(start, rank, self.in_features)
                hidden = F.linear(input, A)
            B, start = self._matrix(start, size, self.in_features if rank is None else rank)
            found.append(F.linear(hidden, B, alone))
        y = torch.cat(found, -1) if len(found) > 1 else found[0]
        y = y if self.order is None else y.index_select(-1, self.order)
        return y if alone is not None or self.bias is None else y + self.bias

    def _matrix(self, start: int, rows: int, columns: int) -> tuple[Tensor, int]:
        """A matrix out of the numbers, and where the next one starts."""
        stop = start + rows * columns
        return self.weight[0, start:stop].view(rows, columns), stop


def put_factors(edits: Edits, model: nn.Module, sites: Sequence[Site], kept: Ranks) -> None:
    """Two smaller matrices in the place of each that lost directions; sites: of the model."""
    for path in dict.fromkeys(path for path, _ in kept):
        parts = [site for site in sites if site.path == path and site.form == "linear"]
        own = {site.role: kept[path, site.role] for site in parts if (path, site.role) in kept}
        edits.put(model, path, factored(model.get_submodule(path), parts, own))


def refuse_factors(model: nn.Module, kept: Ranks) -> None:
    """Raise InputError for what is no plain linear."""
    for path, _ in kept:
        if not plain(model.get_submodule(path)):
            raise InputError(f"ranks must be cut from plain linears, but {path} is none: leave it "
                             "masked, latency will not drop")


@torch.no_grad()
def factored(linear: nn.Module, sites: Sequence[Site], kept: Mapping[str, Sequence[int]],
             ) -> Factored:
    """What stands in a linear's place where some of its directions are gone.

    sites: of the linear, all of its outputs together;  kept: role -> directions that stay; parts
    that are not named stay whole, as those whose factors would be larger than the matrix.
    """
    owner: Any = linear
    matrix, d_in = matrix_of(linear), matrix_of(linear).shape[1]
    parts, numbers, rows = [], [], []
    for site in sites:
        index = rows_of(site)
        own = matrix[index]
        rows.append(index)
        chosen = kept.get(site.role)
        if chosen is not None and len(chosen) * (d_in + len(index)) < own.numel():
            parts.append(Part(len(index), len(chosen)))
            numbers += [factor.reshape(-1).to(matrix) for factor in halves(own, chosen)]
        else:
            parts.append(Part(len(index), None))
            numbers.append((own if chosen is None else own + change(own, chosen)).reshape(-1))
    place = torch.cat(rows)
    assert len(place) == len(matrix)  # discovery slices a fused projection without a gap
    order = None if bool((place == torch.arange(len(place))).all()) else place.argsort()
    weight = nn.Parameter(torch.cat(numbers).unsqueeze(0),
                          requires_grad=owner.weight.requires_grad)
    order = order if order is None else order.to(matrix.device)
    return Factored(d_in, parts, weight, owner.bias, order).train(linear.training)


def halves(matrix: Tensor, kept: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A (k, d_in) and B (d_out, k) with B A the matrix's part in the kept directions; float64.

    The singular values are shared evenly, so that neither is large.
    """
    U, s, V = directions(matrix)
    index = torch.tensor(list(kept), dtype=torch.int64)
    root = s[index].sqrt()
    return root.unsqueeze(-1) * V[index], U[:, index] * root


def change(matrix: Tensor, kept: Sequence[int]) -> Tensor:
    """What the matrix (d_out, d_in) loses with all other directions, as what is added to it."""
    A, B = halves(matrix, kept)
    return (B @ A - matrix.detach().cpu().double()).to(matrix)


def matrix_of(linear: nn.Module) -> Tensor:
    """W (d_out, d_in); GPT-2's Conv1D stores the transpose."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if hasattr(linear, "nf") else weight.detach()


def rows_of(site: Site) -> Tensor:
    """Output features of the module that are the site's, int64 (d_out,)."""
    return torch.cat([torch.arange(a, b) for a, b in site.index or ((0, site.d_out),)])

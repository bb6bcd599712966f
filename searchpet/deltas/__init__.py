"""Delta: a gated graft on a site.  One kind per file of this folder, found by name.

A delta has `width` coordinates.  Coordinate i is multiplied by a gate z_i and is silent at
z_i = `neutral`.  Kinds are final: they subclass Delta and nothing subclasses them.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from searchpet.site import Site

Stage = Literal["weight", "input", "parallel", "sequential", "output"]


@dataclass(frozen=True)
class Affine:
    """A delta written as `M x + g * y + c`; None stands for zero.

    M: (d_out, d_in), g: (d_out,), c: (d_out,); gates and scales are inside.
    """

    M: Tensor | None = None
    g: Tensor | None = None
    c: Tensor | None = None


class Delta(nn.Module, abc.ABC):
    """What every kind provides.  Options are keyword arguments of `__init__`.

    stage:   what the delta is added to.  `input`: the site's x, before anything else sees it;
             `parallel`: y, given x and y; `sequential`: the y that the parallel ones have
             changed; `output`: the y that all others have changed.  `weight` masks act on the
             site's weight instead.
    neutral: the gate value at which the delta is silent: 0 for PET (nothing is added), 1 for
             prune masks (nothing is removed; they have no parameters).
    pointwise: True where the delta is g * y + c, so that several of them at a site cost one pass
             over y; `affine` then gives g and c, for gates of any rank.
    run:     consecutive features that a mask's coordinate gates.
    atoms:   True where coordinates are atoms of a factorisation, False where they are channels.
    """

    stage: Stage = "parallel"
    neutral: ClassVar[float] = 0.0
    atoms: ClassVar[bool] = False
    pointwise: ClassVar[bool] = False

    def __init__(self, width: int, run: int = 1) -> None:
        super().__init__()
        self.width, self.run = width, run

    @classmethod
    @abc.abstractmethod
    def fits(cls, site: Site) -> bool:
        """Whether this kind makes sense at the site."""

    @abc.abstractmethod
    def cost(self) -> Tensor:
        """Parameters of each coordinate, int64 (width,), on the CPU.  Sums to the numel."""

    @abc.abstractmethod
    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """What is added: x (..., d_in), y (..., d_out), z (width,) or (batch, 1, width) ->
        (..., d_out), or (..., d_in) at stage `input`, where y is not given.
        """

    @abc.abstractmethod
    def thin(self, keep: Tensor) -> Delta:
        """A delta with only the coordinates where keep (width,) is True.

        The same function as gating with z = keep; parameters are copies.
        """

    def affine(self, z: Tensor) -> Affine | None:
        """The delta at gates z (width,) as an affine map, or None where it is not one."""
        return None


def each(width: int, cost: int) -> Tensor:
    """int64 (width,) filled with `cost`, on the CPU whatever the default device."""
    return torch.full((width,), cost, dtype=torch.int64, device="cpu")


class Channels(nn.Module):
    """A vector over output channels of which only some may exist.

    `value` (k,) are the stored entries, `index` (k,) their channels, None for all of them.  It is
    called as a module, so that what moves weights between devices sees the call.
    """

    index: Tensor | None

    def __init__(self, size: int, index: Tensor | None = None) -> None:
        super().__init__()
        self.size = size
        self.value = nn.Parameter(torch.zeros(size if index is None else len(index)))
        self.register_buffer("index", index, persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        """z (k,) or (batch, 1, k) -> z * value at the stored channels, 0 elsewhere (..., size)."""
        v = z * self.value
        if self.index is None:
            return v
        full = v.new_zeros(*v.shape[:-1], self.size)
        return full.index_copy(-1, self.index, v)

    def thin(self, keep: Tensor) -> Channels:
        """The stored entries where keep (k,) is True."""
        chosen = keep.nonzero().squeeze(-1)
        index = chosen if self.index is None else self.index[chosen]
        thinner = Channels(self.size, index)
        thinner.value.data.copy_(self.value.data[chosen])
        return thinner


class Groups(nn.Module):
    """Gates over runs of `each` consecutive features, of which some may be gone for good.

    `index` (k,) are the groups that are left, None for all; a feature of another group gets 0.
    """

    index: Tensor | None

    def __init__(self, size: int, each: int, index: Tensor | None = None) -> None:
        super().__init__()
        self.size, self.each = size, each
        self.count = -(-size // each)  # the last group may be shorter
        self.register_buffer("index", index, persistent=False)

    def __len__(self) -> int:
        return self.count if self.index is None else len(self.index)

    def at(self, z: Tensor) -> Tensor:
        """z (k,) or (batch, 1, k) -> a factor per feature (..., size)."""
        if self.index is not None:
            z = z.new_zeros(*z.shape[:-1], self.count).index_copy(-1, self.index, z)
        if self.each == 1:
            return z
        return z.repeat_interleave(self.each, dim=-1)[..., : self.size]

    def thin(self, keep: Tensor) -> Groups:
        """Without the groups where keep (k,) is False."""
        chosen = keep.nonzero().squeeze(-1)
        return Groups(self.size, self.each,
                      chosen if self.index is None else self.index[chosen])


class Mask(Delta):
    """What prune masks share: gates over groups of features, no parameters, neutral at 1."""

    stage: Stage = "input"
    neutral: ClassVar[float] = 1.0

    def __init__(self, site: Site, groups: Groups, **options: Any) -> None:
        super().__init__(width=len(groups), run=groups.each)
        self.site, self.groups, self.options = site, groups, options

    def cost(self) -> Tensor:
        return each(self.width, 0)

    def thin(self, keep: Tensor) -> Delta:
        make: Any = type(self)
        thinner: Delta = make(self.site, **self.options, channels=self.groups.thin(keep))
        return thinner

"""Settling what is pruned by scores: how units of different sort and size are compared."""

from __future__ import annotations

import torch
from torch import Tensor

from searchpet.errors import unknown
from searchpet.limits import Limits

ALLOCATIONS = ("per_cost", "global", "per_layer")


def settle(limits: Limits, score: Tensor, allocation: str) -> Tensor:
    """keep (units,) bool within the limit on inference, from scores (units,) of prune units.

    allocation: `per_cost`, score per unit of the measure; `global`, scores as they are;
    `per_layer`, the same share of every mask, and whole sublayers and layers stay if they can.
    Raises InputError for another one.
    """
    return limits.fill(compare(limits, score, allocation))


def compare(limits: Limits, score: Tensor, allocation: str) -> Tensor:
    """Scores (units,) of which those of prune units can be compared with each other."""
    if allocation not in ALLOCATIONS:
        raise unknown("allocation", allocation, ALLOCATIONS)
    if allocation == "global" or limits.keep is None:
        return score
    return _per_cost(limits, score) if allocation == "per_cost" else _ranked(limits, score)


def _per_cost(limits: Limits, score: Tensor) -> Tensor:
    """Score per unit of cost: what taking the unit out of the whole model saves."""
    assert limits.keep is not None  # only a limit can be settled
    z = torch.ones(len(score), dtype=torch.float64, requires_grad=True)
    (price,) = torch.autograd.grad(limits.keep.cost.at(z), z)
    return torch.where(limits.space.prunes, score / price.clamp(min=1.0), score)


def _ranked(limits: Limits, score: Tensor) -> Tensor:
    """Place within the mask, in (0, 1); 1 for a mask of one unit."""
    space, ranked = limits.space, score.clone()
    for p in space.placements:
        if p.neutral == 1:
            units = space.unit[p.start : p.start + p.width]
            place = score[units].argsort(stable=True).argsort(stable=True).to(score)
            ranked[units] = (place + 0.5) / p.width if p.width > 1 else torch.ones_like(place)
    return ranked

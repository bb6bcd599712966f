"""Prices: what PET units cost on what pruning leaves of their hosts."""

from __future__ import annotations

import torch
from torch import Tensor

from searchpet.hosts import NOTHING, Hosts, Ties
from searchpet.space import Space


class Prices:
    """Parameters of each PET unit as a function of the prune gates.

    Every kind costs a fixed number per coordinate, so many per input feature, so many per output
    feature; the last two are differences of the kind's own count.
    """

    def __init__(self, space: Space, hosts: Hosts) -> None:
        self.space = space
        self.parts = [(p, hosts.ties(p.site), *space.slopes(p))
                      for p in space.placements if p.neutral == 0]

    def at(self, z: Tensor) -> Tensor:
        """z (units,) -> (units,) float64; 0 for prune units."""
        z = z.double()
        padded = torch.cat([z, z.new_ones(1)])
        price = torch.zeros(len(self.space), dtype=torch.float64, device=z.device)
        for place, ties, base, per_in, per_out in self.parts:
            units = self.space.unit[place.start : place.start + place.width].to(z.device)
            alive = _alive(ties, z)
            outs = padded[_padded(ties.outs, len(z))]
            if place.atoms or place.width != place.site.d_out:
                ins = padded[_padded(ties.ins, len(z))]
                lost = per_in * (len(ins) - ins.sum()) + per_out * (len(outs) - outs.sum())
                cost = (base - lost) * (ins.sum() > 0) * (outs.sum() > 0)
            else:
                cost = base * outs
            price.index_add_(0, units, (alive * cost).expand(place.width).to(price))
        return price


def _alive(ties: Ties, z: Tensor) -> Tensor:
    """Whether the site is there at all: its masks' gates, and something left to mix."""
    alive = z.new_ones(())
    for i in ties.above:
        alive = alive * z[i]
    if ties.mixed:
        alive = alive * (z[torch.tensor(ties.mixed, device=z.device)].sum() > 0)
    return alive


def _padded(ids: Tensor, last: int) -> Tensor:
    return torch.where(ids == NOTHING, last, ids)

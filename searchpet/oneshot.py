"""One-shot worth of units on a backbone that nothing was searched on: which coordinates to take
where only their number is known.

- with a task: channels of PET by gradient energy, the mean over a few training batches of
  (dL/dw)^2 at init, where the delta is silent; prune units by |dL/dz| (`searchpet.importance`);
- without: channels by the mean magnitude of their row of the weight (of their element in a norm),
  prune units by the magnitude of what they take out, directions by their energy.

Atoms of a factorisation are alike before they have learned: they are worth the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from searchpet.factors import matrix_of, rows_of
from searchpet.importance import importance
from searchpet.space import Placement, Space
from searchpet.stats import collect_parameters
from searchpet.supernet import Supernet

BATCHES = 8  # scores settle after a few

Batch = dict[str, Tensor]


def by_task(model: nn.Module, space: Space, head: frozenset[str], seed: int,
            batches: Sequence[Batch], loss: Callable[[Batch], Tensor]) -> Tensor:
    """Worth of each unit (units,) float64 by what the batches say."""
    return _measured(model, space, head, seed, lambda net: _energies(net, batches, loss), "gate",
                     batches, loss)


def by_magnitude(model: nn.Module, space: Space, head: frozenset[str], seed: int) -> Tensor:
    """Worth of each unit (units,) float64 by the pretrained weights alone."""
    ranks = any(p.neutral == 1 and p.atoms for p in space.placements)
    return _measured(model, space, head, seed, _magnitudes, "energy" if ranks else "magnitude",
                     [], lambda batch: torch.zeros(()))


def _measured(model: nn.Module, space: Space, head: frozenset[str], seed: int,
              pet: Callable[[Supernet], Tensor], prune: str, batches: Sequence[Batch],
              loss: Callable[[Batch], Tensor]) -> Tensor:
    net = Supernet(model, space, head, seed)
    model.eval()
    try:
        worth = pet(net)
        if bool(space.prunes.any()):
            found = importance(prune, net, batches, loss, torch.Generator().manual_seed(seed))
            worth = torch.where(space.prunes, found, worth)
    finally:
        net.remove()
    return worth


def _channels(place: Placement, delta: nn.Module) -> bool:
    """Whether each coordinate is one number, of a channel of its own."""
    return (place.neutral == 0 and not place.atoms
            and sum(p.numel() for p in delta.parameters()) == place.width > 1)


def _energies(net: Supernet, batches: Sequence[Batch], loss: Callable[[Batch], Tensor]) -> Tensor:
    space, worth = net.space, torch.zeros(len(net.space), dtype=torch.float64)
    own: dict[str, nn.Parameter] = {}
    for i, (place, graft) in enumerate(zip(space.placements, net.grafts.grafts, strict=True)):
        if _channels(place, graft.delta):
            (own[str(i)],) = graft.delta.parameters()
    if own:
        for name, stats in collect_parameters(own, batches, loss, want={"square"}).items():
            place = space.placements[int(name)]
            assert stats.square is not None  # what was wanted
            units = space.unit[place.start : place.start + place.width]
            worth[units] = stats.square.cpu().double()
    return worth


def _magnitudes(net: Supernet) -> Tensor:
    space, worth = net.space, torch.zeros(len(net.space), dtype=torch.float64)
    for place, graft in zip(space.placements, net.grafts.grafts, strict=True):
        if _channels(place, graft.delta):
            module: Any = net.model.get_submodule(place.site.path)
            if place.site.form == "norm":
                rows = module.weight.detach().abs()
            else:
                rows = matrix_of(module).abs().mean(1)[rows_of(place.site)]
            units = space.unit[place.start : place.start + place.width]
            worth[units] = rows.cpu().double()
    return worth

"""Supernet: a frozen backbone with every delta of a space, gated."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from searchpet.calibrate import groups
from searchpet.deltas import Delta
from searchpet.grafts import Graft, Grafts
from searchpet.site import Site
from searchpet.space import Space, make


def seeded(site: Site, kind: str, options: dict[str, Any], seed: int) -> Delta:
    """A delta whose random init depends on (seed, site, kind) alone, not on what was built before.

    So a retrained structure starts where the search started.
    """
    # hashed: torch reads the low 32 bits of a seed alone
    key = hashlib.sha256(f"{seed}:{site.path}:{site.role}:{kind}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(key[:8], "big") >> 1)
        return make(kind, site, options)


class Supernet:
    """A frozen backbone with every delta of a space, gated by `z`.

    z: (units,) or (batch, units); writing it sets the gates of all deltas.
    home: the device for alpha and the shift: the model's, or the CPU where that lacks float64.
    The head (names in `head`) trains with the deltas; everything else is frozen.
    """

    def __init__(self, model: nn.Module, space: Space, head: frozenset[str], seed: int) -> None:
        self.model, self.space = model, space
        freeze(model, head)
        self.head = [p for name, p in model.named_parameters() if name in head]
        self.grafts = Grafts(model, [
            Graft(p.site, p.kind, seeded(p.site, p.kind, p.options, seed))
            for p in space.placements
        ])
        device = next(model.parameters()).device
        self.home = torch.device("cpu") if device.type == "mps" else device
        self._unit = space.unit.to(device)
        self._whole = len(space) == len(space.unit)  # every coordinate a unit, in order
        self._widths = [p.width for p in space.placements]
        self.z = torch.ones(len(space), device=device)

    @property
    def z(self) -> Tensor:
        """The gates, (units,) or (batch, units)."""
        return self._z

    @z.setter
    def z(self, value: Tensor) -> None:
        value = value.to(self._unit.device)
        self._z = value
        spread = value if self._whole else value.index_select(-1, self._unit)
        self.grafts.z = list(spread.split(self._widths, dim=-1))

    @property
    def trained(self) -> list[nn.Parameter]:
        """What trains: the parameters of all deltas, and the head."""
        return [*self.grafts.deltas.parameters(), *self.head]

    def groups(self, rates: dict[str, float]) -> list[dict[str, Any]]:
        """Parameter groups `{params, kind, lr}` of deltas and head, as they are at init.

        rates: learning rate of each kind and of `head`.
        """
        return groups(self.grafts.grafts, self.head, rates)

    def remove(self) -> None:
        """Take all deltas out of the backbone."""
        self.grafts.detach()


def freeze(model: nn.Module, head: frozenset[str]) -> None:
    """Only the head stays trainable."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in head)

"""Lottery tickets: what strategies need that prune by magnitude, in rounds, while PET learns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from searchpet.bulk import Bulk
from searchpet.factors import matrix_of
from searchpet.grafts import Graft
from searchpet.importance import add_up
from searchpet.masks import filled
from searchpet.site import Site
from searchpet.space import Space
from searchpet.spacefile import read_space
from searchpet.supernet import Supernet

Batch = dict[str, Tensor]
Loss = Callable[[Batch], Tensor]


@torch.no_grad()
def magnitudes(net: Supernet) -> dict[str, Tensor]:
    """|W + dW| of the linears in the blocks by path, float32 (d_out, d_in), all gates open.

    dW is g * W + M of the deltas that are affine in the linear's own input and output; others,
    such as adapters, change no single weight and count nothing.
    """
    at: dict[str, list[Graft]] = defaultdict(list)
    for graft in net.grafts.grafts:
        if graft.delta.neutral == 0 and graft.delta.stage == "parallel":
            at[graft.site.path].append(graft)
    found = {}
    for path in dict.fromkeys(site.path for site in linears(net.space)):
        weight = matrix_of(net.model.get_submodule(path)).float()
        total = weight.clone()
        for graft in at[path]:
            affine = graft.delta.affine(weight.new_ones(graft.delta.width))
            rows = slice(None) if graft.writes is None else graft.writes.to(weight.device)
            if affine is not None and affine.g is not None:
                total[rows] += affine.g.unsqueeze(-1) * weight[rows]
            if affine is not None and affine.M is not None:
                total[rows] += affine.M
        found[path] = total.abs()
    return found


def linears(space: Space) -> list[Site]:
    """The matrices of the blocks."""
    return [site for site in space.sites if site.form == "linear"]


def stand_in(net: Supernet, share: float, loss: Loss, generator: torch.Generator) -> Bulk:
    """Masks of single weights on a space whose units are to be pruned; `remove` them after."""
    space = Space("prune/weights", net.space.sites, read_space("prune/weights").rule)
    return Bulk(space, net.model, share, f"{100 * share:.3g}%", loss, generator)


def refilled(space: Space, kept: Mapping[str, Tensor], score: Mapping[str, Tensor]) -> Tensor:
    """From single weights to units (units,) float64: above 0 where a unit is within the quota of
    its mask, higher = keep.

    kept, score: by path (d_out, d_in), bool and the weights' scores.  The quota is as many units
    as the kept weights of all of them fill; units with the largest kept share come first.  A mask
    of one unit, a sublayer's or a layer's, has no quota: it stays before all others, by its share.
    """
    def sums(matrices: Mapping[str, Tensor]) -> Tensor:
        return add_up(dict(matrices), linears(space), space)

    size = sums({path: torch.ones_like(k) for path, k in kept.items()}).clamp(min=1)
    share = sums(kept) / size
    left = sums({path: score[path].cpu() * k.cpu() for path, k in kept.items()}) / size
    found = torch.zeros(len(space), dtype=torch.float64)
    for p in space.placements:
        if p.neutral == 1:
            units = space.unit[p.start : p.start + p.width]
            many = float((share * size)[units].sum() / size[units].mean())
            found[units] = filled(share[units], many, left[units]) if p.width > 1 else (
                1 + share[units])
    return found


class Learner:
    """Deltas and head as they learn under masks that change; `rewind` takes them back.

    keep: float64 (units,), the gates, 1 for all to start with.
    salience: float64 (units,), |z dL/dz| on the training batches, smoothed over steps.
    """

    def __init__(self, net: Supernet, rates: dict[str, float], crowd: float, smooth: float,
                 ) -> None:
        self.net, self.smooth = net, smooth
        groups = net.groups(rates)
        for group in groups:
            group["lr"] *= 1.0 if group["kind"] == "head" else crowd
        self.weights = [p for group in groups for p in group["params"]]
        self.learn = torch.optim.AdamW(groups, weight_decay=0.0)
        self.first = [p.detach().clone() for p in self.weights]
        self.keep = torch.ones(len(net.space), dtype=torch.float64, device=net.home)
        self.salience = torch.zeros_like(self.keep)

    def state(self) -> dict[str, Any]:
        """What a loop must save."""
        return {"weights": self.weights, "learn": self.learn, "first": self.first,
                "keep": self.keep, "salience": self.salience}

    @torch.no_grad()
    def mark(self) -> None:
        """Here is where `rewind` goes; before the first mark, to the init."""
        torch._foreach_copy_(self.first, self.weights)

    @torch.no_grad()
    def rewind(self) -> None:
        """Weights as they were, an optimizer and a salience that have seen nothing."""
        torch._foreach_copy_(self.weights, self.first)
        self.learn.state.clear()
        self.salience.zero_()

    def step(self, loss: Loss, batch: Batch) -> Tensor:
        """One step of the deltas and the head; returns the loss."""
        z = self.keep.float().requires_grad_()
        self.net.z = z
        value = loss(batch)
        slope, *found = torch.autograd.grad(value, [z, *self.weights], materialize_grads=True)
        for weight, gradient in zip(self.weights, found, strict=True):
            weight.grad = gradient
        self.learn.step()
        self.salience.lerp_((slope * z).detach().abs().to(self.salience), 1 - self.smooth)
        return value.detach()

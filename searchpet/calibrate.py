"""Learning rate per kind from one probe: lr_kind = tau / probe_kind.

One Adam step at the same learning rate moves the output of one kind hundreds of times more than
that of another (a rank-8 LoRA against a rank-1 one, say), so a shared rate makes a search choose
the kind that the rate happens to suit.  The probe is the relative change of a site's output in
the first Adam step, per unit of learning rate, over the channels that the delta reaches; the
median over a kind's sites is taken.  tau is then the one knob: the relative change per step.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from searchpet.grafts import Grafts

STEP = 1e-3  # of the probe; the first step is linear in it for every kind that is silent at init


def probe(grafts: Grafts, loss: Callable[[], Tensor]) -> dict[str, float]:
    """Relative output change per unit of learning rate, by kind.

    loss() runs the backbone on a small batch, gates as they are.  Parameters are left as they
    were; gradients of the deltas are not touched.  A kind that the batch does not reach counts as
    1, as a scale does.
    """
    seen: dict[int, tuple[Any, Tensor, Tensor]] = {}

    def remember(i: int, x: Tensor | None, y: Tensor) -> None:
        seen[i] = (x if x is None else x.detach(), y.detach(), grafts.z[i])

    grafts.watch = remember
    try:
        value = loss()
    finally:
        grafts.watch = None
    parameters = list(grafts.deltas.parameters())
    gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    sign = {id(p): g.sign() for p, g in zip(parameters, gradients, strict=True) if g is not None}
    ratios: dict[str, list[float]] = defaultdict(list)
    for i, graft in enumerate(grafts.grafts):
        if i in seen:
            ratio = _moved(graft.delta, seen[i], sign)
            if ratio > 0:
                ratios[graft.kind].append(ratio)
    kinds = {graft.kind for graft in grafts.grafts}
    return {kind: statistics.median(ratios[kind] or [1.0]) for kind in sorted(kinds)}


def rates(probes: dict[str, float], tau: float, fixed: dict[str, float]) -> dict[str, float]:
    """Learning rates: tau / probe for each kind; `fixed` overrides and adds (the head's)."""
    return {**{kind: tau / value for kind, value in probes.items()}, **fixed}


@torch.no_grad()
def _moved(delta: torch.nn.Module, args: tuple[Any, Tensor, Tensor],
           sign: dict[int, Tensor]) -> float:
    """|delta(theta - STEP sign(g)) - delta(theta)| / |y| / STEP on the channels it reaches."""
    y = args[1].float()
    before = delta(*args).float().expand_as(y)
    kept = [p.detach().clone() for p in delta.parameters()]
    for p in delta.parameters():
        if id(p) in sign:
            p.sub_(STEP * sign[id(p)])
    change = delta(*args).float().expand_as(y) - before
    for p, old in zip(delta.parameters(), kept, strict=True):
        p.copy_(old)
    reached = change.flatten(0, -2).abs().amax(0) > 0
    size = y[..., reached].norm()
    return float(change.norm() / size / STEP) if size > 0 else 0.0

"""Slopes of the loss in the gates of a supernet: what closing a unit costs and opening it brings.

`loss(batch)` runs the backbone under the supernet's gates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from searchpet import processes
from searchpet.calibrate import HEAD
from searchpet.stats import evaluating
from searchpet.supernet import Supernet

Batch = dict[str, Tensor]
Loss = Callable[[Batch], Tensor]
SMALL = 1e-3  # of a calibrated step, for the energy: far inside what is linear


def worth(net: Supernet, loss: Loss, batch: Batch, gates: Tensor) -> Tensor:
    """-dL/dz (units,) float64 on the CPU, at these gates (units,)."""
    z = gates.clone().requires_grad_()
    net.z = z
    (slope,) = torch.autograd.grad(loss(batch), z, materialize_grads=True)
    net.z = z.detach()
    return -slope.cpu().double()


def information(net: Supernet, loss: Loss, batch: Batch, gates: Tensor,
                wanted: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Loss of a batch at these gates (units,), Fisher's information of each, E_rows[(dL_row/dz)^2]
    (units,) float64, and the gradients of what is wanted, all in one pass.
    """
    rows = processes.rows(batch)
    z = gates.float().expand(rows, -1).clone().requires_grad_()
    net.z = z
    value = loss(batch)
    slope, *found = torch.autograd.grad(value, [z, *wanted], materialize_grads=True)
    net.z = z.detach()
    return value.detach(), (rows * slope).double().square().mean(0), found


def energy(net: Supernet, loss: Loss, rates: dict[str, float], batches: Sequence[Batch],
           gates: Tensor) -> Tensor:
    """The sum over batches of |lr dL/dtheta|^2 by unit that is silent, (units,) float64.

    gates: (units,) float, open where it is to be known;  rates: of each kind.
    """
    groups = [g for g in net.groups(rates) if g["kind"] != HEAD]
    steps = [(p, g["lr"] ** 2) for g in groups for p in g["params"]]
    start = [p.detach().clone() for p, _ in steps]
    total = torch.zeros(len(net.space), dtype=torch.float64)
    with evaluating(net.model):
        for batch in batches:
            net.z = gates
            slopes = torch.autograd.grad(loss(batch), [p for p, _ in steps],
                                         materialize_grads=True)
            largest = max(float((rate ** 0.5 * g).abs().max())
                          for (_, rate), g in zip(steps, slopes, strict=True))
            size = SMALL / largest if largest > 0 else 0.0
            with torch.no_grad():
                for (p, rate), g in zip(steps, slopes, strict=True):
                    p.sub_(size * rate * g)
            if size:
                total += worth(net, loss, batch, gates) / size
            with torch.no_grad():
                for (p, _), old in zip(steps, start, strict=True):
                    p.copy_(old)
    return total

"""Gates: from keep probabilities p (units,) to gate values z (units,).  Pure functions."""

from __future__ import annotations

import torch
from torch import Tensor


def concrete(p: Tensor, temperature: float, generator: torch.Generator, rows: int = 0) -> Tensor:
    """Binary concrete sample z = sigmoid((logit(u) + logit(p)) / temperature), float32.

    Maddison et al. 2017, arXiv:1611.00712; with temperature 1 this is S3PET's gate.  P(z > 1/2) =
    p at every temperature.  `rows` > 0 draws one sample per example: (rows, units).
    """
    shape = (rows, *p.shape) if rows else p.shape
    u = torch.rand(shape, generator=generator, dtype=p.dtype).to(p.device)
    noise = torch.logit(u, eps=1e-9)
    return torch.sigmoid((noise + torch.logit(p, eps=1e-12)) / temperature).float()


def straight_through(z: Tensor, where: Tensor) -> Tensor:
    """z with the units where (units,) bool open or closed, and the gradient of the soft gate.

    Bengio et al. 2013, arXiv:1308.3432.
    """
    hard = (z > 0.5).to(z.dtype)
    return torch.where(where.to(z.device), z + (hard - z).detach(), z)


def decided(p: Tensor, price: Tensor) -> Tensor:
    """Parameters of the units whose gate is more open than not: the structure so far."""
    return price[p.detach() > 0.5].sum()


def entropy(p: Tensor) -> Tensor:
    """Mean entropy of the gates in bits: 0 decided, 1 undecided."""
    q = p.detach().double().clamp(1e-12, 1 - 1e-12)
    bits = -(q * q.log2() + (1 - q) * (1 - q).log2())
    return bits.mean()

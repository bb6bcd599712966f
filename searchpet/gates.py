"""Gates: from keep probabilities p (units,) to gate values z (units,).  Pure functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from searchpet.device import sent

LOW, HIGH, COLD = -0.1, 1.1, 2 / 3  # of hard concrete gates: the stretch and the temperature
_SHIFT = COLD * math.log(-LOW / HIGH)  # a gate is closed where noise + s is at most this


def concrete(p: Tensor, temperature: float, generator: torch.Generator, rows: int = 0) -> Tensor:
    """Binary concrete sample z = sigmoid((logit(u) + logit(p)) / temperature), float32.

    Maddison et al. 2017, arXiv:1611.00712; with temperature 1 this is S3PET's gate.  P(z > 1/2) =
    p at every temperature.  `rows` > 0 draws one sample per example: (rows, units).
    """
    shape = (rows, *p.shape) if rows else p.shape
    u = torch.rand(shape, generator=generator, dtype=p.dtype)
    u = sent(u, p.device)
    noise = torch.logit(u, eps=1e-9)
    return torch.sigmoid((noise + torch.logit(p, eps=1e-12)) / temperature).float()


def hard_concrete(s: Tensor, generator: torch.Generator) -> Tensor:
    """Hard concrete sample m = clamp(sigmoid((logit(u) + s) / b) (r - l) + l, 0, 1), float32.

    Louizos et al. 2018, arXiv:1712.01312, eq. 10 to 12, with l = -0.1, r = 1.1, b = 2/3: exactly 0
    or 1 with positive probability, and with a gradient in s (units,) between.
    """
    u = sent(torch.rand(s.shape, generator=generator, dtype=s.dtype), s.device)
    soft = torch.sigmoid((torch.logit(u, eps=1e-9) + s) / COLD)
    return (soft * (HIGH - LOW) + LOW).clamp(0, 1).float()


def opening(s: Tensor) -> Tensor:
    """P(m > 0) = sigmoid(s - b log(-l / r)) of hard concrete gates (units,): the expected L0."""
    return torch.sigmoid(s - _SHIFT)


def location(p: Tensor) -> Tensor:
    """The s (units,) of hard concrete gates that are above 0 with probability p: of `opening` the
    inverse.  Where p is within a budget in expectation, so is the number of gates above 0.
    """
    return torch.logit(p, eps=1e-12) + _SHIFT


def straight_through(z: Tensor, where: Tensor) -> Tensor:
    """z with the units where (units,) bool open or closed, and the gradient of the soft gate.

    Bengio et al. 2013, arXiv:1308.3432.
    """
    hard = (z > 0.5).to(z.dtype)
    return torch.where(where.to(z.device), z + (hard - z).detach(), z)


def decided(p: Tensor, price: Tensor) -> Tensor:
    """Parameters of the units whose gate is more open than not: the structure so far."""
    return (price * (p.detach() > 0.5)).sum()


def entropy(p: Tensor) -> Tensor:
    """Mean entropy of the gates in bits: 0 decided, 1 undecided."""
    q = p.detach().double().clamp(1e-12, 1 - 1e-12)
    bits = -(q * q.log2() + (1 - q) * (1 - q).log2())
    return bits.mean()

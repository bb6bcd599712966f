"""The budget: a parameter count that is never exceeded, in the search and in the result.

`shift` moves all logits by one number so that the expected cost is the limit (S3PET's shifted
global sigmoid, Hu et al. 2022, arXiv:2206.07382, sec. 3.3).  `fill` turns scores into a choice.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from searchpet.errors import InputError

_BYTES = {"B": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3}
_FORM = re.compile(r"^(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*(%|B|KB|MB|GB)?$", re.IGNORECASE)
_FORMS = "a share in (0%, 100%] such as 0.01%, a count such as 2271, or bytes such as 9KB"


@dataclass(frozen=True)
class Budget:
    """limit: parameters;  text: as the user wrote it;  denominator: the backbone's parameters."""

    limit: int
    text: str
    denominator: int

    @staticmethod
    def parse(text: str | int, parameters: int, element_size: int = 4) -> Budget:
        """Read `0.01%`, `2271` or `9KB` for a backbone of `parameters` parameters.

        Shares and bytes are rounded down; KB = 1000 bytes; a stored element has `element_size`
        bytes.  Raises InputError when the text is none of the three or the share is outside
        (0, 100 %].
        """
        raw = str(text).strip()
        match = _FORM.match(raw)
        if not match:
            raise InputError(f"budget must be {_FORMS}, but got {raw!r}")
        number, unit = match[1], (match[2] or "").upper()
        value = _exact(number)
        if unit == "%":
            if not 0 < value <= 100:
                raise InputError(f"budget must be a share in (0%, 100%], but got {raw!r}")
            return Budget(math.floor(value * parameters / 100), raw, parameters)
        if unit:
            return Budget(math.floor(value * _BYTES[unit] / element_size), raw, parameters)
        if value != math.floor(value):
            raise InputError(
                f"budget without a unit must be a whole count, but got {raw!r}; "
                f"write {raw}% for a share"
            )
        return Budget(int(value), raw, parameters)

    def afford(self, cheapest: int, what: str = "unit") -> None:
        """Raise InputError when not even the cheapest unit can be bought."""
        if self.limit < cheapest:
            share = 100 * cheapest / self.denominator
            raise InputError(
                f"budget must buy at least one {what}: the cheapest costs {cheapest:,} parameters "
                f"({share:.2g}%), but {self.text} is {self.limit:,}; ask for at least {cheapest}"
            )


def _exact(number: str) -> Any:
    """The decimal as a fraction: 0.07 % of a count must not lose one to binary rounding."""
    from fractions import Fraction

    return Fraction(number)


def threshold(alpha: Tensor, price: Tensor, limit: float, beta: float = 1.0) -> float:
    """zeta with sum_i price_i sigmoid((alpha_i - zeta) / beta) = limit.

    alpha, price (units,) float64.  Safeguarded Newton on the logarithm of the sum, started from
    the solution on every k-th unit, so that a million units need a handful of full passes.
    """
    if len(alpha) > 40_000:
        step = len(alpha) // 10_000
        part, whole = price[::step], price.sum()
        share = limit * float(part.sum() / whole)
        start = threshold(alpha[::step], part, share, beta) if part.sum() > 0 else 0.0
    else:
        start = float(alpha.mean())
    # at these ends every p is below (above) what the limit allows
    reach = beta * (abs(math.log(limit / float(price.sum()))) + 40.0)
    low, high = float(alpha.min()) - reach, float(alpha.max()) + reach
    zeta, target = min(max(start, low), high), math.log(limit)
    for _ in range(200):
        p = torch.sigmoid((alpha - zeta) / beta)
        spent = price * p
        total = float(spent.sum())
        gap = math.log(total) - target if total > 0 else -math.inf
        if abs(gap) < 1e-12 or high - low < 1e-12 * max(1.0, abs(zeta)):
            break
        low, high = (zeta, high) if gap > 0 else (low, zeta)
        slope = float((spent * (1 - p)).sum()) / (beta * total) if total > 0 else 0.0
        step_to = zeta + gap / slope if slope > 1e-12 else math.inf
        zeta = step_to if low < step_to < high else (low + high) / 2
    return zeta


def shift(alpha: Tensor, price: Tensor, limit: float, beta: float = 1.0) -> Tensor:
    """p = sigmoid((alpha - zeta) / beta) with sum_i price_i p_i = limit; float64 (units,).

    Differentiable in alpha with the exact implicit gradient dzeta/dalpha_i = w_i / sum w, w_i =
    price_i p_i (1 - p_i): one Newton step from the detached solution carries it.  A limit at or
    above the total price gives p = 1.  Raises ValueError unless limit > 0.
    """
    if not limit > 0:
        raise ValueError(f"limit > 0 must hold, but got {limit=}")
    alpha, price = alpha.double(), price.double()
    if limit >= float(price.sum()):
        return torch.ones_like(alpha) + 0.0 * alpha
    zeta = threshold(alpha.detach(), price, limit, beta)
    p = torch.sigmoid((alpha - zeta) / beta)
    weight = price * (p * (1 - p)).detach() / beta
    total = float(weight.sum())
    if total <= 0.0:  # all gates saturated: zeta does not move
        return p
    correction = ((price * p).sum() - limit) / total  # value ~ 0, gradient -> dzeta/dalpha
    return torch.sigmoid((alpha - (zeta + correction)) / beta)


def fill(score: Tensor, cost: Tensor, limit: int) -> Tensor:
    """Take units by falling score, skip what does not fit, go on: keep (units,) bool.

    cost (units,) int64.  Never above the limit; ties go to the lower index.  Rounds take a whole
    run of units at once, and each round ends at a cost that can never fit again, so there are at
    most as many rounds as distinct costs.
    """
    keep = torch.zeros(len(score), dtype=torch.bool)
    order = torch.argsort(score.detach().cpu().double(), descending=True, stable=True)
    price = cost.cpu()[order]
    left = int(limit)
    while True:
        fits = price <= left
        order, price = order[fits], price[fits]
        if not len(order):
            return keep
        run = int((price.cumsum(0) <= left).sum())
        keep[order[:run]] = True
        left -= int(price[:run].sum())
        order, price = order[run:], price[run:]

"""The budget: a parameter count that is never exceeded, in the search and in the result.

`shift` moves all logits by one number so that the expected cost is the limit (S3PET's shifted
global sigmoid, Hu et al. 2022, arXiv:2206.07382, sec. 3.3).  `fill` turns scores into a choice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from searchpet.device import free
from searchpet.errors import InputError

_BYTES = {"B": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3}
MANY = 40_000  # units from which single precision and a subsample pay
MOST, BLIND = 200, 24  # Newton steps at most; where nobody looks: 12 do for logits up to 100
# the digits are bounded: nobody means more, and exact arithmetic on 1e999999999 takes for ever
_FORM = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?(?:e[+-]?[0-9]{1,2})?)\s*(%|B|KB|MB|GB)?",
                   re.IGNORECASE)
_LARGEST = 10**15  # parameters; more than any model has, and what a spec may say
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
        match = _FORM.fullmatch(raw)
        if not match:
            raise InputError(f"budget must be {_FORMS}, but got {raw[:40]!r}")
        number, unit = match[1], (match[2] or "").upper()
        value = Fraction(number)  # 0.07 % of a count must not lose one to binary rounding
        if unit == "%" and not 0 < value <= 100:
            raise InputError(f"budget must be a share in (0%, 100%], but got {raw!r}")
        if not unit and value.denominator != 1:
            raise InputError(
                f"budget without a unit must be a whole count, but got {raw!r}; "
                f"write {raw}% for a share"
            )
        sizes = {"%": Fraction(parameters, 100), "": Fraction(1)}
        sizes |= {name: Fraction(count, element_size) for name, count in _BYTES.items()}
        limit = math.floor(value * sizes[unit])
        if limit > _LARGEST:
            raise InputError(f"budget must be at most {_LARGEST:,} parameters, but {raw} is more")
        return Budget(limit, raw, parameters)

    @property
    def said(self) -> str:
        """`10 parameters` for a count, `0.01%, which is 2 parameters` for a share or bytes."""
        count = f"{self.limit:,} parameter{'s' * (self.limit != 1)}"
        return count if self.text.isdecimal() else f"{self.text}, which is {count}"

    def afford(self, cheapest: int, what: str = "unit") -> None:
        """Raise InputError when not even the cheapest unit can be bought."""
        if self.limit < cheapest:
            numbers = f"{cheapest:,} parameter{'s' * (cheapest != 1)}"
            share = 100 * cheapest / self.denominator
            raise InputError(
                f"budget must buy at least one {what}: the cheapest costs {numbers} "
                f"({share:.2g}%), but got {self.said}; ask for at least {cheapest}"
            )


def threshold(alpha: Tensor, price: Tensor, limit: Tensor | float, beta: float = 1.0) -> Tensor:
    """zeta () with sum_i price_i sigmoid((alpha_i - zeta) / beta) = limit, for 0 < limit < total.

    alpha, price (units,) float64.  Safeguarded Newton on the logarithm of the sum.  Many units
    start from the solution on every k-th of them, then from one in single precision, so that a
    million units cost a few passes.
    """
    start = alpha.mean()
    if len(alpha) > MANY and free(alpha):
        every = len(alpha) // 10_000
        part = price[::every]
        start = threshold(alpha[::every], part, limit * (part.sum() / price.sum()), beta)
        start = _newton(alpha.float(), price.float(), limit, beta, start, 1e-5)
    return _newton(alpha, price, limit, beta, start, 1e-13)


def _newton(alpha: Tensor, price: Tensor, limit: Tensor | float, beta: float, zeta: Tensor,
            tolerance: float) -> Tensor:
    """`threshold` from a starting point, until the sum is within `tolerance`, relative.

    On an accelerator, which would have to be asked, `BLIND` steps; the best of them counts.
    """
    limit = torch.as_tensor(limit, dtype=torch.float64, device=alpha.device)
    # at these ends every p is below (above) what the limit allows
    reach = beta * ((limit / price.sum(dtype=torch.float64)).log().abs() + 40.0)
    low, high = alpha.min().double() - reach, alpha.max().double() + reach
    zeta = zeta.double().clamp(low, high)
    p = torch.empty_like(alpha)
    best, least = zeta, torch.full_like(zeta, math.inf)
    for _ in range(MOST if free(alpha) else BLIND):
        torch.sub(alpha, zeta.to(alpha), out=p).div_(beta).sigmoid_()
        total = (price @ p).double()
        slope = (total - (price @ p.square_()).double()) / beta
        gap = (total / limit).log()
        best, least = torch.where(gap.abs() < least, zeta, best), torch.minimum(gap.abs(), least)
        if free(alpha) and (float(least) < tolerance
                            or float(high - low) < 1e-15 * max(1.0, abs(float(zeta)))):
            break
        low, high = torch.where(gap > 0, zeta, low), torch.where(gap > 0, high, zeta)
        nearer = zeta + gap * total / slope
        inside = (low < nearer) & (nearer < high)  # not where it is NaN
        zeta = torch.where(inside, nearer, (low + high) / 2)
    return best


class _Shift(torch.autograd.Function):
    """p = sigmoid((alpha - zeta(alpha)) / beta), zeta by the implicit function theorem."""

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, price: Tensor, limit: float, beta: float) -> Tensor:
        zeta = threshold(alpha, price, limit, beta)
        p = torch.sub(alpha, zeta).div_(beta).sigmoid_()
        p = torch.where(price.sum() <= limit, torch.ones_like(p), p)
        ctx.save_for_backward(p, price)
        ctx.beta = beta
        return p

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        p, price = ctx.saved_tensors
        s = p * (1 - p) / ctx.beta
        weight = price @ s
        mean = torch.where(weight > 0, (grad @ s) / weight, 0.0)  # saturated: zeta stays
        return s * (grad - mean * price), None, None, None


def shift(alpha: Tensor, price: Tensor, limit: float, beta: float = 1.0) -> Tensor:
    """p = sigmoid((alpha - zeta) / beta) with sum_i price_i p_i = limit; float64 (units,).

    Differentiable in alpha with the exact implicit gradient: dzeta/dalpha_i = w_i / sum w with
    w_i = price_i p_i (1 - p_i).  A limit at or above the total price gives p = 1.
    Raises ValueError unless limit > 0.
    """
    if not limit > 0:
        raise ValueError(f"limit > 0 must hold, but got {limit=}")
    alpha, price = alpha.double(), price.double()
    if free(price) and limit >= float(price.sum()):
        return torch.ones_like(alpha) + 0.0 * alpha
    p: Tensor = _Shift.apply(alpha, price, float(limit), beta)  # type: ignore[no-untyped-call]
    return p


class _ShiftTo(torch.autograd.Function):
    """p = sigmoid((alpha - zeta(alpha)) / beta) for a cost that is no weighted sum."""

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, cost: Callable[[Tensor], Tensor], limit: float,
                beta: float) -> Tensor:
        reach = 40.0 * beta
        low, high = float(alpha.min()) - reach, float(alpha.max()) + reach
        for _ in range(80):
            zeta = (low + high) / 2
            p = torch.sub(alpha, zeta).div_(beta).sigmoid_()
            low, high = (zeta, high) if float(cost(p)) > limit else (low, zeta)
            if high - low < 1e-12 * max(1.0, abs(zeta)):
                break
        with torch.enable_grad():
            q = p.detach().requires_grad_()
            (price,) = torch.autograd.grad(cost(q), q)
        ctx.save_for_backward(p, price)
        ctx.beta = beta
        return p

    backward = _Shift.backward


def shift_to(alpha: Tensor, cost: Callable[[Tensor], Tensor], limit: float, beta: float = 1.0,
             ) -> Tensor:
    """`shift` for any cost(p) that rises with every p_i: sums of products, say.

    cost: p (units,) float64 -> a number, differentiable.  The implicit gradient is that of
    `shift` with price_i = dcost/dp_i.  A bisection, which looks at every cost.
    Raises ValueError unless cost(0) < limit.
    """
    alpha = alpha.double()
    if float(cost(torch.ones_like(alpha))) <= limit:
        return torch.ones_like(alpha) + 0.0 * alpha
    if not float(cost(torch.zeros_like(alpha))) < limit:
        raise ValueError(f"cost(0) < limit must hold, but got {limit=}")
    p: Tensor = _ShiftTo.apply(alpha, cost, float(limit), beta)  # type: ignore[no-untyped-call]
    return p


def fill_to(score: Tensor, cost: Callable[[Tensor], Tensor], limit: float) -> Tensor:
    """`fill` for such a cost: keep (units,) bool with cost(keep) <= limit.

    Takes the longest run of best units that fits, then each further one that still does.
    Raises ValueError unless cost(0) <= limit.
    """
    order = torch.argsort(score.detach().cpu().double(), descending=True, stable=True)

    def first(count: int) -> Tensor:
        keep = torch.zeros(len(score), dtype=torch.float64)
        keep[order[:count]] = 1
        return keep

    low, high = 0, len(order)
    if float(cost(first(high))) <= limit:
        return first(high).bool()
    if float(cost(first(0))) > limit:
        raise ValueError(f"cost(0) <= limit must hold, but got {limit=}")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if float(cost(first(middle))) <= limit else (low, middle)
    keep = first(low)
    for i in order[low:].tolist():
        keep[i] = 1
        if float(cost(keep)) > limit:
            keep[i] = 0
    return keep.bool()


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


def fill_groups(score: Tensor, cost: Tensor, limit: int, group: Tensor) -> Tensor:
    """`fill` over groups that are taken or left whole: bool per unit.

    group int64 (units,); units of a group have the same score.
    """
    names, number = torch.unique(group, return_inverse=True)
    total = torch.zeros(len(names), dtype=torch.int64).index_add_(0, number, cost)
    worth = torch.zeros(len(names), dtype=torch.float64).index_copy_(0, number, score)
    return fill(worth, total, limit)[number]

"""Knapsack: the units of greatest value together within a limit.

Maximise sum_i v_i x_i subject to sum_i c_i x_i <= limit, x_i in {0, 1}.  In a search v is a unit's
score (a gate's probability, a saliency) and c its parameters, so the greedy order that `fill`
takes is that of v / c, the optimum of the relaxation with x in [0, 1] (Dantzig 1957).

Exact, in three steps: (1) The relaxation's optimum U and the greedy value G; lambda is v / c where
the relaxation breaks off.  (2) x_i is settled wherever |v_i - lambda c_i| > U - G: the other
choice would cost more than an optimum can (Ingargiola and Korsh 1973).  (3) A dynamic programme
over what is left, its costs divided by their greatest common divisor.  Units of one cost are taken
best first, and the cheapest cost comes last, so that thousands of single channels cost nothing.
"""

from __future__ import annotations

from functools import reduce
from math import gcd

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from searchpet.budget import fill

WORK = 2 * 10**8  # sums of the programme: about a second, at most 200 MB
Floats = NDArray[np.float64]


def pack(value: Tensor, cost: Tensor, limit: int, work: int = WORK) -> Tensor:
    """keep (units,) bool of the greatest summed value within the limit; the slack is filled.

    value (units,); cost (units,) int64, above 0.  Units of no value are only taken to fill what is
    left.  The greedy choice stays where nothing is better, and where a value is infinite.

    Where the programme would take more than `work` sums it is run on the units nearest to the cut:
    then the value is still never below the greedy one, and below the optimum by less than that of
    one unit, the first that the greedy order finds too dear.
    """
    v, c = value.detach().cpu().double(), cost.cpu().long()
    greedy = fill(v / c, c, limit)
    if not bool(v.isfinite().all()):
        return greedy
    gain, room = _gap(v, c, limit, greedy)
    if room is None or gain <= 0:
        return greedy
    price = v - room * c  # what a unit is worth more than its parameters are at the cut
    able = (v > 0) & (c <= limit)
    core = able & (price.abs() <= gain)
    keep = able & (price > 0)
    numbers = _nearest(price.abs(), c, core, limit - int(c[keep & ~core].sum()), work)
    keep[numbers] = False
    left = limit - int(c[keep].sum())
    keep[numbers[_programme(v[numbers].numpy(), c[numbers].numpy(), left)]] = True
    if float(v[keep].sum()) <= float(v[greedy & (v > 0)].sum()):
        return greedy
    rest = (~keep).nonzero().squeeze(-1)
    keep[rest[fill(v[rest] / c[rest], c[rest], limit - int(c[keep].sum()))]] = True
    return keep


def _gap(v: Tensor, c: Tensor, limit: int, greedy: Tensor) -> tuple[float, float | None]:
    """U - G with room for rounding, and lambda; None where everything of value fits."""
    order = torch.argsort(v / c, descending=True, stable=True)
    order = order[(v[order] > 0) & (c[order] <= limit)]
    spent = c[order].cumsum(0)
    run = int((spent <= limit).sum())
    if run == len(order):
        return 0.0, None
    used = int(spent[run - 1]) if run else 0
    room = float(v[order[run]] / c[order[run]])
    bound = float(v[order[:run]].sum()) + room * (limit - used)
    gain = bound - float(v[greedy & (v > 0)].sum())
    return (gain + 1e-12 * abs(bound) if gain > 1e-12 * abs(bound) else 0.0), room


def _nearest(distance: Tensor, c: Tensor, core: Tensor, left: int, work: int) -> Tensor:
    """Numbers of the core's units, the nearest to the cut as far as the programme can take them.

    left: of the limit, for the core.  What is taken away leaves its part of it at most.
    """
    numbers = core.nonzero().squeeze(-1)
    numbers = numbers[distance[numbers].argsort(stable=True)]
    while len(numbers) and _sums(c[numbers].numpy(), left) > work:
        numbers = numbers[: len(numbers) // 2]
    return numbers


def _sums(cost: NDArray[np.int64], limit: int) -> int:
    """How many sums the programme takes; arrays of a class are as long as the limit."""
    unit = reduce(gcd, cost.tolist())
    size = limit // unit + 1
    prices, counts = np.unique(cost // unit, return_counts=True)
    most = np.minimum(counts, (size - 1) // prices)
    return int((most[1:] + 1).sum()) * int(size)


def _programme(value: Floats, cost: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """Numbers of the units of greatest summed value; value (n,) above 0, cost (n,) above 0."""
    if not len(cost):
        return np.zeros(0, dtype=np.int64)
    unit = reduce(gcd, cost.tolist())
    size, prices = limit // unit + 1, np.unique(cost // unit)[::-1]
    best = np.zeros(size)  # best[w]: the most that costs of at most w buy
    steps: list[tuple[int, NDArray[np.int64], NDArray[np.unsignedinteger]]] = []
    for price in prices.tolist():
        own = np.flatnonzero(cost == price * unit)
        own = own[np.argsort(-value[own], kind="stable")][: (size - 1) // price]
        sums = np.concatenate([[0.0], np.cumsum(value[own])])
        if price == prices[-1]:
            many = np.arange(len(sums))
            taken = int(np.argmax(best[size - 1 - price * many] + sums))
            found, at = [own[:taken]], size - 1 - price * taken
            break
        best, count = _add(best, sums, price)
        steps.append((price, own, count))
    for price, own, count in reversed(steps):
        found.append(own[: count[at]])
        at -= price * int(count[at])
    return np.concatenate(found)


def _add(best: Floats, sums: Floats, price: int) -> tuple[Floats, NDArray[np.unsignedinteger]]:
    """`best` with units of one price, and how many of them each cost buys.  sums[j]: best j."""
    found = best.copy()
    count = np.zeros(len(best), dtype=np.min_scalar_type(len(sums)))
    for j in range(1, len(sums)):
        offered = best[: len(best) - j * price] + sums[j]
        better = offered > found[j * price :]
        found[j * price :][better] = offered[better]
        count[j * price :][better] = j
    return found, count

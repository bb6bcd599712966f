"""Apportioning: from what each place asks for to what a budget gives it.

Places ask for counts of coordinates.  All are multiplied by one number, the largest with which the
budget is not exceeded, and rounded along the depth, for each role and kind by itself: place j of a
chain gets round(s C_j) - round(s C_{j-1}), C the cumulative counts.  So over any stretch of layers
the count is within one of what was asked, and what a place cannot hold is left to the others.
What is then left of the budget goes to further coordinates of these places by Webster's rule, the
k-th for asked / (k - 1/2), and at last to places where nothing was asked.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cell:
    """A place: how much it asks for, which units it has, best first, and what each costs.

    chain: places with the same one follow each other along the depth.
    """

    chain: Hashable
    asked: float
    units: Tensor  # int64 (width,)
    price: int


def counts(cells: Sequence[Cell], scale: float) -> list[int]:
    """How many units each cell gets."""
    asked: dict[Hashable, float] = defaultdict(float)
    given: dict[Hashable, int] = defaultdict(int)
    found = []
    for cell in cells:
        asked[cell.chain] += cell.asked
        # a hair above a half is one: 12 times 1/12 must be 1
        due = math.floor(scale * asked[cell.chain] + 0.5 + 1e-9)
        found.append(min(len(cell.units), due - given[cell.chain]))
        given[cell.chain] = due
    return found


def cost(cells: Sequence[Cell], taken: Sequence[int]) -> int:
    return sum(cell.price * n for cell, n in zip(cells, taken, strict=True))


def scaled(cells: Sequence[Cell], limit: int) -> list[int]:
    """The counts at the largest scale that the limit allows."""
    least = min((cell.asked for cell in cells if cell.asked > 0), default=0.0)
    if least == 0.0:
        return [0] * len(cells)
    low, high = 0.0, (limit + 1) / least
    best = counts(cells, low)
    for _ in range(100):
        middle = (low + high) / 2
        taken = counts(cells, middle)
        if cost(cells, taken) <= limit:
            low, best = middle, taken
        else:
            high = middle
    return best


def apportion(cells: Sequence[Cell], limit: int, units: int) -> Tensor:
    """Scores (units,) float64: `budget.fill` by them gives each cell its count, then the rest.

    2 for what the counts give; in (0, 1) for more where something was asked; below 0 elsewhere.
    """
    score = torch.full((units,), -math.inf, dtype=torch.float64)
    for cell, n in zip(cells, scaled(cells, limit), strict=True):
        number = torch.arange(len(cell.units), dtype=torch.float64) + 0.5  # k - 1/2
        if cell.asked > 0:
            claim = cell.asked / number
            score[cell.units] = claim / (1 + claim)
        else:
            score[cell.units] = -number / max(1, len(cell.units))
        score[cell.units[:n]] = 2.0
    return score

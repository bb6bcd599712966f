"""The knee of a curve: where more cost stops paying."""

from __future__ import annotations

import math
from collections.abc import Sequence


def knee(points: Sequence[tuple[float, float]]) -> int | None:
    """Which point of a rising curve lies furthest above the line from its first to its last.

    points: (cost, score) by rising cost, which counts by its logarithm; both scaled to [0, 1], as
    in Kneedle (Satopaa et al. 2011).  None for fewer than three, and where no point lies above.
    """
    if len(points) < 3 or points[-1][1] <= points[0][1]:
        return None
    xs = [math.log(max(1.0, cost)) for cost, _ in points]
    low, high = points[0][1], points[-1][1]
    above = [(y - low) / (high - low) - (x - xs[0]) / (xs[-1] - xs[0])
             for x, (_, y) in zip(xs, points, strict=True)]
    best = max(range(len(points)), key=above.__getitem__)
    return best if above[best] > 0 else None

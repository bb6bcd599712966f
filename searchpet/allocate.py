"""Allocation: from the scores of several tensors and a kept ratio to what is kept where.

Pure functions.  Keeps are bool tensors of the scores' shapes, True = kept; ratios are kept
fractions.  Exactly `round(ratio * N)` of the N elements are kept, in every mode.  Ties go to the
element that comes first: tensors in the mapping's order, elements in row-major order.  An element
is a weight, or a unit where the scores are of units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from searchpet.errors import InputError, unknown

Scores = Mapping[str, Tensor]
Keeps = dict[str, Tensor]


def keep_masks(scores: Scores, ratio: float, how: str = "global",
               cost: Mapping[str, Tensor | float] | None = None) -> Keeps:
    """keep by name: exactly round(ratio * N) elements, chosen `how`; higher scores stay.

    global:      one threshold for all tensors.
    per_layer:   the same ratio in each tensor, to the nearest count (largest remainders).
    per_row:     the same ratio in each row of each tensor, as Wanda compares weights.
    erdos_renyi: density_l in proportion to (n_in + n_out) / (n_in n_out), at most 1; what the
                 full ones cannot take goes to the others in the same proportion.  Mocanu et al.
                 2018, arXiv:1707.04780; Evci et al. 2020, arXiv:1911.11134 (the sum of the sides
                 over their product, for any number of sides).
    per_cost:    one threshold for score / cost; cost: by name, a number for each element or one
                 tensor of the score's shape, above 0.  It counts elements, not costs: for a limit
                 on the cost there is `budget.fill`.  Meant for scores >= 0.
    Raises InputError for no scores, a ratio outside [0, 1], a NaN score, a cost not above 0.
    """
    if not scores:
        raise InputError("scores must be of at least one tensor, but there is none; widen the "
                         "selection")
    if how not in ALLOCATIONS:
        raise unknown("allocation", how, ALLOCATIONS)
    if (cost is not None) != (how == "per_cost"):
        raise InputError("allocation per_cost must have the cost of each element, and no other "
                         f"allocation one, but got {how} {'without' if cost is None else 'with'} "
                         "it; single weights cost the same, take global")
    if cost is not None:
        scores = {name: s / _above_zero(name, s, cost) for name, s in scores.items()}
    for name, s in scores.items():
        if bool(s.isnan().any()):
            raise InputError(f"scores must be numbers, but {name} holds NaN; check its statistics")
    total = kept(ratio, sum(s.numel() for s in scores.values()))
    return ALLOCATIONS[how](scores, total)


def kept(ratio: float, count: int) -> int:
    """round(ratio * count); InputError unless ratio is in [0, 1]."""
    if not 0 <= ratio <= 1:
        raise InputError(f"a kept ratio must be in [0, 1], but got {ratio}")
    return round(ratio * count)


def top(score: Tensor, k: int) -> Tensor:
    """keep of the score's shape, on its device: the k highest, ties to the first elements."""
    flat = score.detach().cpu().reshape(-1)
    flat = flat.float() if flat.dtype.itemsize < 4 else flat
    keep = torch.zeros(len(flat), dtype=torch.bool)
    if k > 0:
        least = flat.kthvalue(len(flat) - k + 1).values  # linear in time, unlike a sort
        keep = flat > least
        ties = (flat == least).nonzero().squeeze(-1)
        keep[ties[: k - int(keep.sum())]] = True
    return keep.reshape(score.shape).to(score.device)


def _global(scores: Scores, total: int) -> Keeps:
    joined = torch.cat([s.detach().cpu().reshape(-1) for s in scores.values()])
    parts = top(joined, total).split([s.numel() for s in scores.values()])
    return {name: part.reshape(s.shape).to(s.device)
            for part, (name, s) in zip(parts, scores.items(), strict=True)}


def _per_layer(scores: Scores, total: int) -> Keeps:
    sizes = [s.numel() for s in scores.values()]
    counts = apportion(sizes, sizes, total)
    return {name: top(s, k) for k, (name, s) in zip(counts, scores.items(), strict=True)}


def _per_row(scores: Scores, total: int) -> Keeps:
    rows = {name: s.reshape(-1, s.shape[-1]) if s.dim() > 1 else s.reshape(1, -1)
            for name, s in scores.items()}
    sizes = [size for r in rows.values() for size in [r.shape[1]] * r.shape[0]]
    counts = torch.tensor(apportion(sizes, sizes, total), dtype=torch.long)
    parts = counts.split([r.shape[0] for r in rows.values()])
    keeps = {}
    for part, (name, r) in zip(parts, rows.items(), strict=True):
        order = r.detach().argsort(dim=1, descending=True, stable=True)
        keep = _ranks(order) < part.to(r.device)[:, None]
        keeps[name] = keep.reshape(scores[name].shape)
    return keeps


def _erdos_renyi(scores: Scores, total: int) -> Keeps:
    sizes = [s.numel() for s in scores.values()]
    # density ∝ sum of sides / product of sides, so the count ∝ the sum of sides
    sides = [sum(s.shape) if s.numel() else 0 for s in scores.values()]
    counts = apportion([max(side, int(n > 0)) for side, n in zip(sides, sizes, strict=True)],
                       sizes, total)
    return {name: top(s, k) for k, (name, s) in zip(counts, scores.items(), strict=True)}


ALLOCATIONS: dict[str, Callable[[Scores, int], Keeps]] = {
    "global": _global, "per_layer": _per_layer, "per_row": _per_row,
    "erdos_renyi": _erdos_renyi, "per_cost": _global}


def apportion(weights: Sequence[int], caps: Sequence[int], total: int) -> list[int]:
    """Counts that sum to `total`, in proportion to the weights, each at most its cap.

    Shares above a cap are cut and the excess goes to the others in proportion; then the largest
    remainders are rounded up, ties to the first.  Exact arithmetic.  total <= sum of caps must
    hold, and a weight above 0 for every cap above 0.
    """
    full: set[int] = set()
    while True:
        free = [i for i in range(len(weights)) if i not in full]
        left = total - sum(caps[i] for i in full)
        unit = Fraction(left, sum(weights[i] for i in free) or 1)
        over = {i for i in free if unit * weights[i] > caps[i]}
        if not over:
            break
        full |= over
    shares = {i: unit * weights[i] for i in free}
    counts = [caps[i] if i in full else int(shares[i]) for i in range(len(weights))]
    order = sorted(free, key=lambda i: int(shares[i]) - shares[i])  # stable: ties to the first
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _above_zero(name: str, score: Tensor, cost: Mapping[str, Tensor | float]) -> Tensor:
    price = torch.as_tensor(cost.get(name, 0.0), device=score.device)
    if not bool((price > 0).all()) or (price.dim() > 0 and price.shape != score.shape):
        raise InputError(f"cost must be above 0 for every element, but that of {name} is not, or "
                         f"has another shape than its score, {tuple(score.shape)}")
    return price


def _ranks(order: Tensor) -> Tensor:
    """The inverse of permutations along the last axis: the place of each element."""
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


# --- patterns in one matrix ---------------------------------------------------------------------


def n_m(score: Tensor, n: int, m: int, axis: int = -1) -> Tensor:
    """keep of the score's shape: the n highest of every m consecutive elements along `axis`.

    The last axis of a (d_out, d_in) weight is the input's, where hardware wants the pattern.
    Raises InputError unless 0 < n <= m and m divides the axis.
    """
    size = score.shape[axis]
    if not 0 < n <= m:
        raise InputError(f"n:m must keep 0 < n <= m, but got {n}:{m}")
    if size % m:
        raise InputError(f"m must divide the axis of an n:m pattern, but it has {size} elements "
                         f"and m is {m}; leave this weight out")
    groups = score.detach().movedim(axis, -1).unflatten(-1, (size // m, m))  # (..., groups, m)
    keep = _ranks(groups.argsort(dim=-1, descending=True, stable=True)) < n
    return keep.flatten(-2).movedim(-1, axis)


def blocks(score: Tensor, r: int, c: int, ratio: float) -> Tensor:
    """keep (d_out, d_in): the r x c blocks of highest summed score, round(ratio * blocks) of them.

    Raises InputError unless r divides d_out and c divides d_in.
    """
    rows, columns = score.shape
    if r < 1 or c < 1 or rows % r or columns % c:
        raise InputError(f"blocks must divide the weight, but {r} x {c} does not divide "
                         f"{rows} x {columns}")
    grid = score.detach().cpu().double().reshape(rows // r, r, columns // c, c).sum((1, 3))
    keep = top(grid, kept(ratio, grid.numel()))
    return keep.repeat_interleave(r, 0).repeat_interleave(c, 1).to(score.device)


# --- schedules: the kept ratio over time; a locked mask has none, it stays ----------------------


def _progress(step: int, begin: int, end: int) -> float:
    if end < begin:
        raise InputError(f"a schedule must hold begin <= end, but got {begin} > {end}")
    return 1.0 if step >= end else max(0.0, (step - begin) / (end - begin))


def one_shot(step: int, begin: int, end: int, ratio: float) -> float:
    """Everything until `begin`, the target ratio from then on."""
    return ratio if step >= begin else 1.0


def linear(step: int, begin: int, end: int, ratio: float) -> float:
    """1 at `begin`, the target at `end`, a straight line between."""
    return ratio + (1 - ratio) * (1 - _progress(step, begin, end))


def cubic(step: int, begin: int, end: int, ratio: float) -> float:
    """1 - s_t, s_t = s_f (1 - (1 - (t - t0) / (t1 - t0))^3): most of the weights go early.

    Zhu and Gupta 2017, arXiv:1710.01878, eq. 1, from sparsity 0 to s_f = 1 - ratio.
    """
    return ratio + (1 - ratio) * (1 - _progress(step, begin, end)) ** 3


def exponential(step: int, begin: int, end: int, ratio: float) -> float:
    """ratio ^ progress: the same fraction of what is left goes in every step."""
    return float(ratio ** _progress(step, begin, end))


SCHEDULES: dict[str, Callable[[int, int, int, float], float]] = {
    "one_shot": one_shot, "linear": linear, "cubic": cubic, "exponential": exponential}


def rounds(ratio: float, per_round: float = 0.2) -> list[float]:
    """Kept ratios of iterative pruning: each round removes `per_round` of what is left.

    The last round removes less, so that the list ends at `ratio` exactly.  Frankle and Carbin
    2019, arXiv:1803.03635.  Raises InputError unless both are in (0, 1], (0, 1).
    """
    if not 0 < ratio <= 1 or not 0 < per_round < 1:
        raise InputError(f"rounds need a ratio in (0, 1] and per_round in (0, 1), but got {ratio} "
                         f"and {per_round}")
    found, now = [], 1 - per_round
    while now > ratio * (1 + 1e-9):  # what rounding alone leaves is no round
        found.append(now)
        now *= 1 - per_round
    return [*found, ratio]

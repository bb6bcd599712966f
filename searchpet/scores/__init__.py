"""Scores: how important each weight is.  One `score(stats) -> Tensor` per file of this folder.

Higher = keep, in every file.  A score sees one weight matrix (or one tensor of a PET module) and
what was measured of it, the `Stats`; it has the weight's shape and mutates nothing.  Measuring is
the work of `searchpet.stats`, and choosing what to keep that of `searchpet.allocate`.

    @needs("grad")
    def score(stats: Stats) -> Tensor:
        assert stats.grad is not None  # what `needs` promises
        return (stats.weight * stats.grad).abs()
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from searchpet.errors import InputError, unknown

REDUCTIONS = ("sum", "mean", "l2")
# field of Stats -> where it comes from, for messages
_SOURCES = {
    "grad": 'collect it with want={"grad"}',
    "square": 'collect it with want={"square"}',
    "hessian_grad": 'collect it with want={"hessian_grad"}',
    "norm": 'collect it with want={"norm"}; a PET parameter has none',
    "moved": "add it up with searchpet.stats.add_movement while the weights train",
    "update": "set it to the trained weight less the pretrained one",
    "low_rank": "set it to the LoRA on this weight and the gradients of its factors",
    "generator": "give a torch.Generator",
}


class LowRank(NamedTuple):
    """A LoRA W + scaling B A and the mean gradients of its factors.

    A, grad_A: (r, d_in);  B, grad_B: (d_out, r);  scaling: alpha / r.
    """

    A: Tensor
    B: Tensor
    grad_A: Tensor
    grad_B: Tensor
    scaling: float


@dataclass(frozen=True, eq=False)
class Stats:
    """What is known about one weight; None where it was not measured.

    weight: (d_out, d_in) float32; a PET parameter may have any shape.  Of the same shape:
    grad:         mean over the batches of each batch's gradient g of the loss.
    square:       mean over the batches of g ** 2.
    hessian_grad: H g; H is the loss's Hessian over all weights that were collected together.
    moved:        - sum_t g_t * w_t over training steps t.
    update:       trained weight - pretrained weight.
    Of other forms:
    norm:         (d_in,), the l2 norm of each input feature over the calibration tokens.
    low_rank:     a LoRA on the weight;  generator: the random numbers of score `random`.
    Raises InputError when a shape does not fit the weight's.
    """

    weight: Tensor
    grad: Tensor | None = None
    square: Tensor | None = None
    hessian_grad: Tensor | None = None
    norm: Tensor | None = None
    moved: Tensor | None = None
    update: Tensor | None = None
    low_rank: LowRank | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        shape = self.weight.shape
        for name in ("grad", "square", "hessian_grad", "moved", "update"):
            _fit(name, getattr(self, name), shape)
        _fit("norm", self.norm, shape[-1:])
        if self.low_rank is not None:
            r = self.low_rank.A.shape[:1]
            for name in ("A", "grad_A"):
                _fit(name, getattr(self.low_rank, name), r + shape[-1:])
            for name in ("B", "grad_B"):
                _fit(name, getattr(self.low_rank, name), shape[:1] + r)


def _fit(name: str, value: Tensor | None, shape: torch.Size) -> None:
    if value is not None and value.shape != shape:
        raise InputError(f"{name} must fit its weight, shape {tuple(shape)}, but has shape "
                         f"{tuple(value.shape)}; weights are (d_out, d_in)")


Score = Callable[[Stats], Tensor]


def needs(*names: str) -> Callable[[Score], Score]:
    """Say which fields of Stats a score needs beside the weight.

    They are checked before each call: InputError names the first that is None.  What collects can
    read them from `needs_of`.
    """
    def wrap(score: Score) -> Score:
        @functools.wraps(score)
        def checked(stats: Stats) -> Tensor:
            for name in names:
                if getattr(stats, name) is None:
                    raise InputError(f"score {score.__module__.rpartition('.')[2]} must have the "
                                     f"statistic {name}, but it is None; {_SOURCES[name]}")
            return score(stats)

        checked.needs = names  # type: ignore[attr-defined]
        return checked

    return wrap


def needs_of(score: Score) -> tuple[str, ...]:
    """The fields of Stats that the score needs beside the weight."""
    found: tuple[str, ...] = getattr(score, "needs", ())
    return found


def unit_scores(score: Tensor | Mapping[str, Tensor], units: Tensor | Mapping[str, Tensor],
                reduce: str = "sum") -> Tensor:
    """From scores of weights to scores of units: float64 (units,), on the CPU.

    score: one tensor, or several by name where a unit spans them (an attention head: rows of the
    query, key and value, columns of the output).
    units: the unit's number of every weight, int64, broadcast to the score's shape: (d_out, 1)
    numbers rows, (d_in,) columns; -1 is no unit.  By name where the scores are.
    reduce: `sum`, `mean` (units of different sizes), or `l2`, the root of the sum of squares.
    Raises InputError unless the numbers are 0, 1, ... without a gap.
    """
    if reduce not in REDUCTIONS:
        raise unknown("reduce", reduce, REDUCTIONS)
    scores = {"": score} if isinstance(score, Tensor) else score
    maps = {"": units} if isinstance(units, Tensor) else units
    if scores.keys() != maps.keys():
        raise InputError(f"units must number the weights of every score, but they are of "
                         f"{sorted(maps)} and the scores of {sorted(scores)}")
    value = torch.cat([s.detach().cpu().double().reshape(-1) for s in scores.values()])
    number = torch.cat([maps[name].cpu().expand_as(s).reshape(-1) for name, s in scores.items()])
    value, number = value[number >= 0], number[number >= 0]
    size = torch.bincount(number)
    if not len(size) or not bool(size.all()):
        gap = int((size == 0).nonzero()[0]) if len(size) else 0
        raise InputError(f"units must be numbered 0, 1, ... without a gap, but none is {gap}")
    part = value.square() if reduce == "l2" else value
    total = torch.zeros(len(size), dtype=torch.float64).index_add_(0, number, part)
    return total / size if reduce == "mean" else total.sqrt() if reduce == "l2" else total


def degenerate(score: Tensor | Mapping[str, Tensor]) -> bool:
    """Whether all scores are exactly equal, so that a mask would be decided by ties alone.

    So it is with SNIP on PET factors of which one is zero at init: w = 0 on the one side, g = 0 on
    the other.  Of several tensors: whether all scores of all of them are equal; ask for each by
    itself to find one that has no order of its own.  `searchpet.stats.collect_or_warm` is the way
    out.  A single score has nothing to choose from and is not degenerate.
    """
    tensors = [score] if isinstance(score, Tensor) else list(score.values())
    flat = [s.reshape(-1) for s in tensors if s.numel()]
    if sum(len(s) for s in flat) < 2:
        return False
    return all(bool((s == flat[0][0]).all()) for s in flat)


def contribution(x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
    """What a layer adds: the mean over tokens of 1 - cos(x, y), a scalar.

    x, y (..., d): the layer's input and output, both residual streams; mask (...): nonzero where a
    token counts, None for all of them.  Block influence of ShortGPT, Men et al. 2024,
    arXiv:2403.03853, eq. 1; `contribution` of Sajjad et al. 2020, arXiv:2004.03844.
    Raises InputError when shapes differ or no token counts.
    """
    if x.shape != y.shape or (mask is not None and mask.shape != x.shape[:-1]):
        raise InputError(
            "a layer's input and output must have one shape (..., d) and the mask (...), but got "
            f"{[None if t is None else tuple(t.shape) for t in (x, y, mask)]}")
    x, y = x.detach().float(), y.detach().float()
    away = 1 - torch.cosine_similarity(x, y, dim=-1)
    away = away.reshape(-1) if mask is None else away[mask != 0]
    if not len(away):
        raise InputError("contribution must see at least one token, but the mask is all zero")
    return away.mean()

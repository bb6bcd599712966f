"""Strategies: ways to rank a space's units within a budget.  One `search` per file.

A strategy is `search(problem, **hyperparameters) -> Ranking`.  It sees the supernet's loss, the
units with their costs, and the limit; it writes gates and steps parameter groups, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from searchpet.errors import InputError
from searchpet.limits import Keep, Limits
from searchpet.space import Space
from searchpet.supernet import Supernet

Batch = dict[str, Tensor]
Settle = Callable[[str, str, Sequence[Batch]], None]  # score, allocation, batches


class Loop(Protocol):
    """Steps that survive a crash: `for step in loop: ...; loop.report(...)`.

    Iterating restores the state objects from a checkpoint, seeds all randomness from (seed,
    step), and saves now and then; so an interrupted search goes on where it stopped.
    """

    def __iter__(self) -> Iterator[int]: ...
    def report(self, **figures: float | Tensor) -> None: ...


def _unmeasured(name: str, batches: Sequence[Batch]) -> Tensor:
    raise RuntimeError(f"a problem must be given `importance` to score units by {name}")


@dataclass
class Problem:
    """All that a strategy may see.

    limit:     parameters that the kept PET units may cost together.
    keep:      what inference may cost, where the space has prune masks.
    limits:    both, on the space's units: `shift` for probabilities, `fill` for a choice.
    settled:   which prune units stay, (units,) bool, where that is decided already.
    importance: importance(name, batches) -> (units,), a score of every prune unit.
    settle_weights: (score, allocation, batches) chooses masks of single weights, which are no
        units, and hooks them in; None where the space has none.
    settle_pet: the same for the parameters of PET itself, `limit` of which stay.
    train:     train[step] is a batch of the half that the deltas learn from.
    valid:     valid[step] is a batch of the half that the structure is judged by.
    loss:      loss(batch) runs the backbone with the supernet's current gates.
    rates:     learning rate of each kind, and of `head`.
    steps:     how many steps a learning strategy should take.
    loop:      loop(steps, **state) -> Loop; state are tensors, modules and optimizers.
    generator: the only source of random numbers.
    """

    net: Supernet
    space: Space
    limit: int
    train: Any
    valid: Any
    loss: Callable[[Batch], Tensor]
    rates: dict[str, float]
    steps: int
    loop: Callable[..., Loop]
    generator: torch.Generator
    keep: Keep | None = None
    settled: Tensor | None = None
    importance: Callable[[str, Sequence[Batch]], Tensor] = _unmeasured
    settle_weights: Settle | None = None
    settle_pet: Settle | None = None

    @cached_property
    def limits(self) -> Limits:
        """The budgets on the space's units."""
        return Limits(self.space, self.limit, self.keep, self.settled)


@dataclass(frozen=True)
class Ranking:
    """score (units,) float, higher is better; keep (units,) bool, within the limit."""

    score: Tensor
    keep: Tensor
    notes: dict[str, Any] = field(default_factory=dict)


def law(name: str, value: float, holds: bool, wanted: str) -> None:
    """Raise InputError unless a hyperparameter's law holds."""
    if not holds:
        raise InputError(f"{name} must be {wanted}, but got {value}; change it with --set")


def descend(problem: Problem, optimizer: torch.optim.Optimizer, batch: Batch) -> Tensor:
    """One step of the deltas and the head on a batch, under the present gates; returns the loss.

    Gates get no gradient.  A delta that no example of the batch reaches has gradient 0.
    """
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    loss = problem.loss(batch)
    found = torch.autograd.grad(loss, weights, materialize_grads=True)
    for weight, gradient in zip(weights, found, strict=True):
        weight.grad = gradient
    optimizer.step()
    return loss.detach()

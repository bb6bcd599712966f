"""Strategies: ways to rank a space's units within a budget.  One `search` per file.

A strategy is `search(problem, **hyperparameters) -> Ranking`.  It sees the supernet's loss, the
units with their costs, and the limit; it writes gates and steps parameter groups, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from searchpet import processes
from searchpet.calibrate import HEAD
from searchpet.errors import InputError
from searchpet.gates import decided, entropy
from searchpet.limits import Keep, Limits
from searchpet.space import Space
from searchpet.supernet import Supernet

Batch = dict[str, Tensor]
Settle = Callable[[str, str, Sequence[Batch], int], None]  # score, allocation, batches, steps


class Masks(Protocol):
    """Masks of single weights that are hooked in.

    gates: by site and kind, int8 (d_out, d_in), or one for each tile or whatever else a mask keeps
        whole: 1 where it stays.  Writing into them is at once what the model computes with; they
        are state for a loop whose masks change.
    share: of all gates, those that the limit leaves.
    """

    @property
    def gates(self) -> dict[str, Tensor]: ...
    @property
    def share(self) -> float: ...
    def kept(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights that stay, by path: bool, of the shapes of the matrices in `like`."""


class SettleWeights(Protocol):
    """Choose masks of single weights by the name of a score, or by scores of matrices by path.

    What an earlier call has pruned does not come back.  ease in [0, 1]: how far the limit is still
    relaxed towards everything.
    """

    def __call__(self, score: str | Mapping[str, Tensor], allocation: str,
                 batches: Sequence[Batch], *, ease: float = 0.0) -> Masks: ...


class Loop(Protocol):
    """Steps that survive a crash: `for step in loop: ...; loop.report(...)`.

    Iterating restores the state objects from a checkpoint, seeds all randomness from (seed,
    step), and saves now and then; so an interrupted search goes on where it stopped.
    """

    def __iter__(self) -> Iterator[int]: ...
    def report(self, **figures: float | Tensor) -> None: ...


def _unwatched(step: int, p: Tensor, price: Tensor, figures: dict[str, Tensor]) -> None:
    """Keeps no record."""


def _unmeasured(name: str, batches: Sequence[Batch]) -> Tensor:
    raise RuntimeError(f"a problem must be given `importance` to score units by {name}")


def _unread(name: str) -> Tensor:
    raise RuntimeError(f"a problem must be given `units_of` to take the spec {name}")


@dataclass
class Problem:
    """All that a strategy may see.

    limit:     parameters that the kept PET units may cost together.
    keep:      what inference may cost, where the space has prune masks.
    limits:    both, on the space's units: `shift` for probabilities, `fill` for a choice.
    settled:   which prune units stay, (units,) bool, where that is decided already.
    must:      PET units that are kept in any case, (units,) bool, where that is wished.
    importance: importance(name, batches) -> (units,), a score of every prune unit.
    settle_weights: (score, allocation, batches) chooses masks of single weights, which are no
        units, and hooks them in; None where the space has none.
    settle_pet: (score, allocation, batches, steps) chooses among the parameters of PET itself,
        `limit` of which stay; steps: of training, where the score needs some.
    units_of:  units_of(name) -> (units,) bool, which units a spec keeps.
    train:     train[step] is a batch of the half that the deltas learn from.
    valid:     valid[step] is a batch of the half that the structure is judged by.
    loss:      loss(batch) runs the backbone with the supernet's current gates; each of several
        processes runs the whole batch, while `spread` has it share the rows.
    rates:     learning rate of each kind, and of `head`; `drawn`, the relative one of parameters
        that are not zero at init.
    watch:     (step, p, price, figures) keeps a record of the gates; `gauge` calls it.
    room:      factor on the rates at which a step with all units open changes no more than it may.
    steps:     how many steps a learning strategy should take.
    loop:      loop(steps, **state) -> Loop; state are tensors, modules and optimizers.  A further
        call is a further stage, with a checkpoint of its own.
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
    must: Tensor | None = None
    importance: Callable[[str, Sequence[Batch]], Tensor] = _unmeasured
    units_of: Callable[[str], Tensor] = _unread
    settle_weights: SettleWeights | None = None
    settle_pet: Settle | None = None
    room: float = 1.0
    watch: Callable[[int, Tensor, Tensor, dict[str, Tensor]], None] = _unwatched

    def __post_init__(self) -> None:
        """Several processes take the scores of units from the first, to the last digit."""
        if processes.size() > 1:
            score = self.importance

            def agreed(name: str, batches: Sequence[Batch]) -> Tensor:
                found = score(name, batches)
                return processes.from_first(lambda: found)

            self.importance = agreed

    def spread(self, batch: Batch) -> Tensor:
        """`loss`, the rows spread over the processes, if there are several.

        Its gradients in the gates, in what they depend on, and in deltas and head are those of
        the whole batch.  It can be derived once.
        """
        if processes.size() == 1:
            return self.loss(batch)
        z = self.net.z

        def own(rows: Batch) -> Tensor:
            self.net.z = z if z.dim() == 1 else processes.shard({"z": z})["z"]
            return self.loss(rows)

        try:
            return processes.mean_loss(own, batch, [z, *self.net.trained])
        finally:
            self.net.z = z

    def gauge(self, step: int, p: Tensor, price: Tensor) -> dict[str, Tensor]:
        """What a step's gates come to, for `Loop.report`; the run's record is told as well.

        p, price (units,) -> expected and decided parameters, mean entropy in bits.
        """
        p = p.detach()
        figures = {"expected": (p * price).sum(), "hard": decided(p, price),
                   "entropy": entropy(p)}
        self.watch(step, p, price, figures)
        return figures

    @property
    def crowd(self) -> float:
        """Factor on the deltas' rates while all units are open.

        Rates suit a structure of `limit` parameters; n independent changes add up like sqrt(n).
        """
        return float(min(1.0, (self.limit / self.space.total) ** 0.5, self.room))

    @cached_property
    def limits(self) -> Limits:
        """The budgets on the space's units."""
        return Limits(self.space, self.limit, self.keep, self.settled, self.must)


@dataclass(frozen=True)
class Ranking:
    """score (units,) float, higher is better; keep (units,) bool, within the limit.

    masks: of the parameters of some deltas, bool by key; those deltas keep single parameters.
    notes: what the strategy has to tell, plain values, for the run's log.
    """

    score: Tensor
    keep: Tensor
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


class Learner(torch.optim.AdamW):
    """AdamW on the deltas and the head of a problem's supernet, at the problem's rates.

    weights: what it trains, in order.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.net.groups(problem.rates), weight_decay=0.0)
        self.weights: list[Tensor] = [p for g in self.param_groups for p in g["params"]]
        self._whole = [group["lr"] for group in self.param_groups]

    def crowd(self, factor: float) -> None:
        """From now on deltas move at their rates times a factor; the head keeps its own."""
        for group, rate in zip(self.param_groups, self._whole, strict=True):
            group["lr"] = rate * (factor if group["kind"] != HEAD else 1.0)

    def follow(self, gradients: Sequence[Tensor]) -> None:
        """A step along gradients, one for each of `weights`."""
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.grad = gradient
        self.step()


def law(name: str, value: float, holds: bool, wanted: str) -> None:
    """Raise InputError unless a hyperparameter's law holds."""
    if not holds:
        raise InputError(f"{name} must be {wanted}, but got {value}; change it with --set")


def descend(problem: Problem, batch: Batch, *optimizers: torch.optim.Optimizer) -> Tensor:
    """One step of each optimizer on a batch, under the present gates, in one pass; its loss.

    What no optimizer has gets no gradient.  A delta that no example reaches has gradient 0.
    """
    learned = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    loss = problem.spread(batch)
    found = torch.autograd.grad(loss, learned, materialize_grads=True)
    for parameter, gradient in zip(learned, found, strict=True):
        parameter.grad = gradient
    for optimizer in optimizers:
        optimizer.step()
    return loss.detach()


@dataclass(frozen=True)
class Phases:
    """What happens at which step of a search that learns gates; warmup, ramp and last are shares.

    warmup: of the steps, at the start, in which only the deltas learn;  cold: final temperature;
    ramp: of the steps, after the warm-up, in which pruning sets in;  last: of the steps, at the
    end, in which prune gates are hard.
    """

    steps: int
    warmup: float
    cold: float
    ramp: float
    last: float = 0.0

    @property
    def start(self) -> int:
        """The first step after the warm-up."""
        return round(self.warmup * self.steps)

    def warm(self, step: int) -> bool:
        return step < self.start

    def starts(self, step: int) -> bool:
        return step == self.start

    def temperature(self, step: int) -> float:
        """From 1 down to `cold`, from the end of the warm-up on."""
        return float(self.cold ** ((step - self.start) / max(1, self.steps - self.start)))

    def ease(self, step: int) -> float:
        """How far the limit on inference is still relaxed: 1 in the warm-up, then down to 0."""
        done = step - self.start
        return 1.0 if done < 0 else max(0.0, 1 - (done + 1) / max(1, self.ramp * self.steps))

    def hard(self, step: int) -> bool:
        return step >= self.steps - round(self.last * self.steps)

"""The only training loop: AdamW, linear warm-up and decay, best checkpoint by validation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from searchpet.batch import Encoded, passes
from searchpet.device import sent
from searchpet.metrics import measure
from searchpet.processes import from_first, mean_loss, rank, size, total
from searchpet.run import StageLoop

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Recipe:
    """How to train; the same for every method that is compared."""

    steps: int = 300
    batch_size: int = 32
    accumulate: int = 1
    warmup: float = 0.06  # of the steps; AdamW's second moment is unreliable before
    weight_decay: float = 0.0  # deltas are few and start at zero: nothing to shrink
    evaluations: int = 6  # validation passes after the first, evenly spread, the last at the end
    patience: int = 4  # evaluations without a better score before training stops
    precision: str = "fp32"

    @property
    def interval(self) -> int:
        """Steps between two evaluations."""
        return max(1, self.steps // self.evaluations)


@dataclass(frozen=True)
class Fit:
    """metrics: at the best validation score after some training; step: when; history: (step,
    score) of each evaluation, the first at step 0: what training has to beat.
    """

    metrics: dict[str, float]
    step: int
    history: list[tuple[int, float]]


@dataclass(frozen=True)
class Outcome:
    """A finished training: validation score, test metrics if asked for, counts, time.

    removed: whether what the spec prunes was really taken out; False if masked or nothing.
    tensors: sha256 of delta.safetensors, where one was written.
    start: the validation score that training began with.
    history: (step, validation score) of each evaluation, the first before any step.
    most: parameters that trained at most, beside the head, where some of them went on the way.
    """

    score: float
    metrics: dict[str, float]
    test: dict[str, float] | None
    trainable: int
    head: int
    tau: float
    step: int
    seconds: float
    removed: bool = False
    tensors: str | None = None
    start: float | None = None
    history: tuple[tuple[int, float], ...] = ()
    most: int | None = None


class Course(Protocol):
    """What else happens in a training, step by step.

    state: what changes by it, for checkpoints, as `StageLoop` takes it.
    """

    @property
    def state(self) -> Mapping[str, Any]: ...
    def moved(self, step: int) -> None:
        """Called after the optimizer's step; its gradients are still there."""

    def settled(self, steps: int) -> bool:
        """Whether what there is after so many steps may be the result."""


@dataclass(frozen=True)
class Plain:
    """Nothing else happens."""

    state: Mapping[str, Any] = field(default_factory=dict)

    def moved(self, step: int) -> None:
        """Nothing."""

    def settled(self, steps: int) -> bool:
        return True


def autocast(model: nn.Module, precision: str) -> contextlib.AbstractContextManager[Any]:
    """bf16 matrix products with fp32 parameters, or nothing."""
    device = next(model.parameters()).device.type
    if precision == "bf16":
        return torch.autocast(device, torch.bfloat16)
    return contextlib.nullcontext()


def to(batch: Batch, model: nn.Module) -> Batch:
    """The batch on the model's device."""
    device = next(model.parameters()).device
    return {name: sent(value, device) for name, value in batch.items()}


def loss_of(model: nn.Module, precision: str = "fp32") -> Callable[[Batch], Tensor]:
    """batch -> mean loss, by the model's own loss function."""

    def loss(batch: Batch) -> Tensor:
        with autocast(model, precision):
            value: Tensor = model(**to(batch, model)).loss
        return value

    return loss


def logits_of(model: nn.Module, precision: str = "fp32") -> Callable[[Batch], Tensor]:
    """batch -> logits (b, outputs), whether it has labels or not."""

    def logits(batch: Batch) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with autocast(model, precision):
            found: Tensor = model(**to(inputs, model)).logits
        return found

    return logits


@torch.no_grad()
def predict(model: nn.Module, encoded: Encoded, batch_size: int, precision: str = "fp32",
            ) -> np.ndarray[Any, Any]:
    """Logits of every row, (n, outputs) float32, in the order of the rows.

    Several processes take turns at the batches; each gets all logits.
    """
    was_training, logits = model.training, logits_of(model, precision)
    model.eval()
    out: np.ndarray[Any, Any] | None = None
    for number, (rows, batch) in enumerate(passes(encoded, batch_size)):
        if number % size() != rank():
            continue
        values = logits(batch).float().cpu().numpy()
        out = np.zeros((len(encoded), values.shape[1]), np.float32) if out is None else out
        out[rows.numpy()] = values
    model.train(was_training)
    return _together(out, len(encoded), model)


def _together(own: np.ndarray[Any, Any] | None, rows: int, model: nn.Module,
              ) -> np.ndarray[Any, Any]:
    """Logits (n, outputs) from those of each process, 0 in the rows of others; None: has no rows.

    The first process has a batch: passes refuses an empty split.
    """
    if size() > 1:
        outputs = from_first(lambda: None if own is None else own.shape[1])
        mine = np.zeros((rows, outputs or 0), np.float32) if own is None else own
        device = next(model.parameters()).device
        own = total(torch.from_numpy(mine).to(device)).cpu().numpy()
    assert own is not None
    return own


def evaluate(model: nn.Module, encoded: Encoded, metrics: Sequence[str], batch_size: int,
             precision: str = "fp32") -> dict[str, float]:
    """Metrics of a labelled split."""
    logits = predict(model, encoded, batch_size, precision)
    assert encoded.labels is not None  # callers choose a labelled split
    return measure(metrics, logits, encoded.labels.numpy())


def schedule(step: int, steps: int, warmup: float) -> float:
    """Factor on the learning rate: linear up over `warmup`, then linear down to 0."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return (steps - step) / max(1, steps - rise)


def fit(model: nn.Module, groups: list[dict[str, Any]], batches: Any, recipe: Recipe,
        loss_at: Callable[[Batch], Tensor], judge: Callable[[], dict[str, float]],
        loop: Callable[..., StageLoop], *, course: Course | None = None,
        until: int | None = None) -> Fit:
    """Train the parameters of `groups`; leave the best checkpoint by validation in them.

    groups: `{params, kind, lr}`; batches[i] is a batch; loss_at(batch) is what is minimised,
    `loss_of(model)` as a rule; judge() gives the metrics on validation data, the score first;
    loop(stage state...) -> StageLoop; after `until` steps it is paused.  Raises InputError when
    the loss stops being finite.
    """
    course = course or Plain()
    optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay)
    base = [group["lr"] for group in optimizer.param_groups]
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    best = [p.detach().clone() for p in trained]
    record: dict[str, Any] = {"history": [], "step": 0, "metrics": None}
    stage = loop(recipe.steps, weights=trained, best=best, optimizer=optimizer, record=record,
                 **course.state)
    for step in stage:
        if step == until:  # it was paused here before
            break
        if not record["history"]:
            record["history"].append([0, _first(judge())])
        model.train()
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * schedule(step, recipe.steps, recipe.warmup)
        optimizer.zero_grad()
        loss = _gradients(batches, step, recipe.accumulate, loss_at, trained)
        optimizer.step()
        course.moved(step)
        done, settled = step + 1, course.settled(step + 1)
        if done == recipe.steps or done % recipe.interval == 0:
            if _note(record, done, judge(), settled):
                torch._foreach_copy_(best, [p.detach() for p in trained])
            if settled and done - record["step"] >= recipe.patience * recipe.interval:
                stage.stop()
        if done == until:
            stage.pause()
        best_score = {"score": _first(record["metrics"])} if record["metrics"] else {}
        stage.report(loss=loss, **best_score)
    with torch.no_grad():
        torch._foreach_copy_(trained, best)
    return Fit(record["metrics"], record["step"], [tuple(pair) for pair in record["history"]])


def _gradients(batches: Any, step: int, parts: int, loss_at: Callable[[Batch], Tensor],
               trained: Sequence[Tensor]) -> Tensor:
    """Add up the gradients of a step's batches; their mean loss."""
    total = torch.zeros(())
    for part in range(parts):
        loss = mean_loss(loss_at, batches[step * parts + part], trained) / parts
        loss.backward()
        total = total + loss.detach().cpu()
    return total


def _note(record: dict[str, Any], step: int, found: dict[str, float], counts: bool) -> bool:
    """Append an evaluation; whether its score is the best so far of those that count."""
    record["history"].append([step, _first(found)])
    if not counts:
        return False
    if record["metrics"] is None or _first(found) > _first(record["metrics"]):
        record.update(metrics=found, step=step)
        return True
    return False


def _first(metrics: dict[str, float]) -> float:
    """The score."""
    return next(iter(metrics.values()))

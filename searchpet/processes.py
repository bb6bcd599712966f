"""Several processes for one job: each takes its rows of a batch, and all keep the same numbers.

Every process runs the same program.  `mean_loss` gives each its rows, every `size()`-th one, and
makes the loss and its gradients the mean over all rows, in one sum over the processes; so what
follows from them, gates and weights and moments, is the same everywhere, and nobody who takes
gradients of it needs to know.  What is computed alike everywhere (importance, say) is taken from
the first process where a last digit may differ.

Data parallelism as in Li et al. 2020 (PyTorch Distributed), arXiv:2006.15704, with differences:
the gradients are averaged when the loss is taken, not while it is derived, since gates and
weights are derived by `torch.autograd.grad`, in parts; and processes may have unequal numbers of
rows, also none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from searchpet.errors import InputError

Batch = dict[str, Tensor]
T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """Which process this is, counted from 0, of how many that work together."""

    rank: int = 0
    size: int = 1


_team = Team()


class Lost(RuntimeError):
    """The processes could not meet: another one has ended."""


@contextlib.contextmanager
def joined(rank: int, size: int) -> Iterator[None]:
    """Inside, this process works with `size - 1` others, in torch's default process group."""
    global _team
    before, _team = _team, Team(rank, size)
    try:
        yield
    finally:
        _team = before


def rank() -> int:
    """Which process this is, counted from 0."""
    return _team.rank


def size() -> int:
    """How many processes work together."""
    return _team.size


def first() -> bool:
    """Whether this is the process that writes and speaks."""
    return _team.rank == 0


def shard(batch: Batch) -> Batch:
    """This process's rows of a batch, possibly none; what has no rows stays."""
    return {name: value[rank() :: size()] if value.dim() else value
            for name, value in batch.items()}


def rows(batch: Batch) -> int:
    """Rows of a batch, the first dimension of what has dimensions."""
    return max((len(value) for value in batch.values() if value.dim()), default=0)


def mean_loss(loss: Callable[[Batch], Tensor], batch: Batch, inputs: Sequence[Tensor]) -> Tensor:
    """loss(batch), (), each process running its rows; differentiable, once, in `inputs` alone.

    loss(batch): a mean over rows.  Where it is a mean over something else, such as tokens, this is
    the mean of the processes' means, weighted by rows.  All processes must call it alike.  A
    gradient that no process has is absent, as in one process.
    Raises Lost where the processes cannot meet.
    """
    if size() == 1:
        return loss(batch)
    own = shard(batch)
    share = rows(own) / rows(batch)
    value = loss(own) if share else None
    wanted = [t for t in inputs if t.requires_grad] if torch.is_grad_enabled() else []
    found: Sequence[Tensor | None] = [None] * len(wanted)
    if value is not None and value.requires_grad and wanted:
        found = torch.autograd.grad(value, wanted, allow_unused=True)
    device = next(t.device for t in inputs)
    mean = torch.zeros((), device=device) if value is None else share * value.detach().float()
    mean, means = _summed(mean, [None if g is None else share * g for g in found], wanted)
    if not wanted:
        return mean
    given: Tensor = _Given.apply(mean, means, *wanted)  # type: ignore[no-untyped-call]
    return given


def _summed(value: Tensor, found: Sequence[Tensor | None], like: Sequence[Tensor],
            ) -> tuple[Tensor, list[Tensor | None]]:
    """Sums over the processes, of a number and of tensors shaped like `like`, in one message.

    None is a 0; None on all processes stays None.
    """
    there = torch.tensor([float(g is not None) for g in found], device=value.device)
    parts = [(torch.zeros_like(t) if g is None else g).float().reshape(-1)
             for g, t in zip(found, like, strict=True)]
    flat = total(torch.cat([value.reshape(1), there, *parts]))
    mean, there, *sums = flat.split([1, len(like), *(t.numel() for t in like)])
    return mean.reshape(()), [
        s.view_as(t).to(t.dtype) if has else None
        for s, t, has in zip(sums, like, (there > 0).tolist(), strict=True)]


class _Given(torch.autograd.Function):
    """A value whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor | None], *_: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Any, ...]:
        return None, None, *(None if g is None else slope * g for g in ctx.gradients)


def total(tensor: Tensor) -> Tensor:
    """The sum over the processes.  Raises Lost where they cannot meet."""
    if size() == 1:
        return tensor
    from accelerate.utils import operations

    with _meeting():
        found: Tensor = operations.reduce(tensor, reduction="sum")
    return found


def average(tensor: Tensor) -> Tensor:
    """The mean over the processes, each counting the same."""
    return total(tensor) / size()


def from_first(make: Callable[[], T]) -> T:
    """What `make()` gives the first process, which alone runs it, for all of them.

    Raises InputError on all if it does there, and Lost where the processes cannot meet.
    """
    if size() == 1:
        return make()
    from accelerate.utils import operations

    sent: list[Any] = [None, None]  # what was made; what was wrong
    if first():
        try:
            sent[0] = make()
        except InputError as error:
            sent[1] = str(error)
    with _meeting():
        made, wrong = operations.broadcast_object_list(sent)
    if wrong is not None:
        raise InputError(wrong)
    found: T = made
    return found


@contextlib.contextmanager
def _meeting() -> Iterator[None]:
    """What goes wrong between processes is Lost."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise Lost("another process has ended") from error

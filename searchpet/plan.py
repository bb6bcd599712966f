"""A plan: what a search would cost, from a few real steps.  Writes nothing.

Times are those of `STEPS` steps of the search and of a training on real batches, scaled up;
early stopping can make a training shorter.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from searchpet.ask import STRATEGY, Ask
from searchpet.engine import CONTROLS
from searchpet.errors import InputError
from searchpet.multitask import open_session
from searchpet.propose import budgets_of, propose
from searchpet.pruning import asked as prune_to
from searchpet.run import Event, RunFolder
from searchpet.session import Session
from searchpet.settings import Settings
from searchpet.spec import Spec

STEPS = 6  # enough for a strategy to pass through its phases
ELEMENT = 4  # bytes of a stored element; deltas are fp32


@dataclass(frozen=True)
class Plan:
    """What is ahead.  Seconds are expected ones; bytes on disk are kept or, at a peak, held."""

    space: str
    units: int
    parameters: int
    cheapest: int
    limit: int
    head: int
    trainings: int
    search_seconds: float
    train_seconds: float
    seconds: float
    memory_bytes: int
    disk_bytes: int
    disk_peak_bytes: int
    warnings: tuple[str, ...]


class _Clock:
    """A listener that notes when each step of each stage ended."""

    def __init__(self) -> None:
        self.ends: dict[str, list[float]] = {}

    def __call__(self, event: Event) -> None:
        self.ends.setdefault(event.stage, []).append(time.monotonic())

    def step(self, stage: str) -> float:
        """Mean seconds of a step; the first one, which warms caches, is left out."""
        ends = self.ends.pop(stage, [])
        return (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else 0.0


def plan(*, strategy: str = STRATEGY, space: str | None = None,
         set: Mapping[str, Any] | None = None, budget: str = "0.01%",
         keep_flops: str | None = None, keep_weights: str | None = None,
         keep_latency: str | None = None, masks: str | None = None,
         must: Sequence[str] | None = None, forbid: Sequence[str] | None = None,
         train: bool = True, controls: int = 1, full: bool = False, count_head: bool = False,
         **settings: Any) -> Plan:
    """Build everything that `search` would, take a few steps, and scale up.

    Raises InputError as `search` does.
    """
    chosen = Settings(**settings)
    if controls < 0:
        raise InputError(f"--controls must be >= 0, but got {controls}")
    ask = Ask(strategy, space, dict(set or {}), budget, count_head,
              prune_to(keep_flops, keep_weights, keep_latency, masks, strategy), must, forbid)
    clock = _Clock()
    session = open_session(replace(chosen, steps=STEPS), clock)
    with session.fresh(chosen.seed) as model:
        units = ask.units(model)
        budgets = budgets_of(session, ask)
        limit = budgets[-1][1]
    with tempfile.TemporaryDirectory() as folder:  # for masks, which lie beside their spec
        spec, spent = propose(session, RunFolder(folder), ask, chosen.seed)
        step = clock.step("search")
        search_seconds = spent + step * max(0, chosen.steps - STEPS)
        train_seconds = _training(session, clock, spec, chosen.steps)
    trainings = len(budgets) + controls * len(CONTROLS) if train else 0
    total = search_seconds + trainings * train_seconds
    if full:
        total += _training(session, clock, "full", chosen.steps)
    kept = ELEMENT * (limit + session.head_size) * trainings + len(spec.text())
    states = 4 * session.identity.parameters if full else 3 * units.total + 3 * len(units)
    return Plan(units.name, len(units), units.total, int(units.cost[~units.prunes].min()), limit,
                session.head_size, trainings + full, search_seconds, train_seconds, total,
                _memory(session.device), kept, kept + ELEMENT * states, session.task.warnings)


def _training(session: Session, clock: _Clock, method: Spec | str, steps: int) -> float:
    """Expected seconds of one training.  Each measured step is followed by an evaluation."""
    session.fit(method, None, session.settings.seed)
    both = clock.step("train")
    with session.fresh(session.settings.seed) as model:
        began = time.monotonic()
        session.evaluate(model, "validation")
        once = time.monotonic() - began
    return max(both - once, 0.1 * both) * steps + once * (session.recipe().evaluations + 1)


def _memory(device: torch.device) -> int:
    """Peak bytes of this process; on a GPU, of its tensors there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak

"""Several tasks at once: `--task a,b,c`.  One structure, one set of deltas, a head for each task.

A step trains one task; tasks take turns in proportion to their weights, so K tasks cost what one
costs.  The search and the training therefore minimise the weighted mean of the tasks' losses, and
the score is the weighted mean of the tasks' scores.  After Xia & Shin 2021, arXiv:2112.05705, who
prune one encoder for several tasks under one budget.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn, tensor

from searchpet.apply import Trained, name_labels
from searchpet.backbone import Backbone
from searchpet.batch import Batch, Encoded
from searchpet.errors import InputError
from searchpet.run import Listener, silent
from searchpet.session import Session
from searchpet.settings import Settings
from searchpet.spec import Spec
from searchpet.task import SPLITS, Task
from searchpet.train import evaluate

MARK = "task"  # key of a batch that says which task it is of


@dataclass(frozen=True)
class Mixture:
    """A split of several tasks; stands where `Encoded` stands for one.  weights sum to 1."""

    parts: tuple[Encoded, ...]
    weights: tuple[float, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def labels(self) -> tuple[Tensor, ...] | None:
        """Those of each task, None where one has none."""
        found = tuple(part.labels for part in self.parts if part.labels is not None)
        return found if len(found) == len(self.parts) else None

    def halved(self, seed: int) -> tuple[Mixture, Mixture]:
        """Each task in two halves."""
        first, second = zip(*(part.halved(seed) for part in self.parts), strict=True)
        return Mixture(first, self.weights), Mixture(second, self.weights)

    def batches(self, batch_size: int, seed: int) -> Turns:
        """Batches of one task each."""
        return Turns([part.batches(batch_size, seed) for part in self.parts], self.weights)


@dataclass
class Turns:
    """Endless batches, `turns[step]` of the task whose turn it is, marked with its number.

    Whose turn it is is a function of step and weights alone: the task that is furthest behind
    its share, the first of equals.
    """

    parts: Sequence[Any]
    weights: Sequence[float]
    _order: list[tuple[int, int]] = field(default_factory=list)  # task, its how manieth batch

    def __getitem__(self, step: int) -> Batch:
        task, number = self.turn(step)
        batch: Batch = self.parts[task][number]
        return {**batch, MARK: tensor(task)}

    def turn(self, step: int) -> tuple[int, int]:
        """Task of a step, and which of its batches it is."""
        counts = [sum(task == k for task, _ in self._order) for k in range(len(self.parts))]
        while len(self._order) <= step:
            due = len(self._order) + 1
            behind = [w * due - n for w, n in zip(self.weights, counts, strict=True)]
            task = max(range(len(behind)), key=behind.__getitem__)
            self._order.append((task, counts[task]))
            counts[task] += 1
        return self._order[step]


class Heads(nn.Module):
    """One module of the head for each task; the active one answers."""

    def __init__(self, of: Sequence[nn.Module]) -> None:
        super().__init__()
        self.of = nn.ModuleList(of)
        self.active = 0  # number of the task that is answered

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.of[self.active](*args, **kwargs)


def turn_to(model: nn.Module, number: int, task: Task) -> None:
    """Let the model answer, and reckon its loss, as on one task."""
    switches: list[Any] = [m for m in model.modules() if isinstance(m, Heads)]
    for switch in switches:
        switch.active = number
    owner: Any = model
    config = owner.config
    config.problem_type = ("regression" if task.type == "regression"
                           else "single_label_classification")
    config.num_labels = task.outputs
    if hasattr(owner, "num_labels"):
        owner.num_labels = task.outputs  # some classes keep a copy
    name_labels(model, task.labels)


def several(settings: Settings) -> bool:
    """Whether the settings name more than one task."""
    return "," in settings.task and not Path(settings.task).expanduser().exists()


def open_session(settings: Settings, listener: Listener = silent) -> Session:
    """A session on the task, or tasks, of the settings."""
    if several(settings):
        return MultiSession(settings, listener)
    if settings.task_weights is not None:
        raise InputError("--task-weights needs several tasks, but --task is "
                         f"{settings.task} alone; drop it, or name them: --task a,b")
    return Session(settings, listener)


class MultiSession(Session):
    """A session on several tasks.  The score `mean` is the weighted mean of the tasks' scores."""

    def _task(self) -> Task:
        names = [name.strip() for name in self.settings.task.split(",")]
        if len(set(names)) < len(names) or "" in names:
            raise InputError("--task must name each task once, as in a,b,c, but got "
                             f"{self.settings.task!r}")
        self.tasks = tuple(self.read(name) for name in names)
        own = [task.name for task in self.tasks]
        if len(set(own)) < len(own):
            raise InputError("several tasks must have names of their own, for their heads, but "
                             f"--task {self.settings.task} gives {', '.join(own)}; rename a "
                             "folder")
        self.weights = _weights(self.settings.task_weights, len(names))
        prints = ",".join(task.fingerprint for task in self.tasks)
        return Task(
            name=",".join(names), type="classification", fields=("text",), label_field="label",
            labels=(), metrics=("mean",), splits={},
            fingerprint=hashlib.sha256(prints.encode()).hexdigest(),
            warnings=tuple(f"{task.name}: {w}" for task in self.tasks for w in task.warnings))

    def _load(self, seed: int) -> Backbone:
        first, *rest = self.tasks
        backbone = self.backbone(first, seed)
        owners = list(dict.fromkeys(name.rpartition(".")[0] for name in sorted(backbone.head)))
        if not all(owners):
            raise InputError("several tasks need a head of modules, but this backbone's head is "
                             f"a parameter of the model itself: {', '.join(backbone.head)}; "
                             "search on one task at a time")
        model: nn.Module = backbone.model
        heads = {owner: [model.get_submodule(owner)] for owner in owners}
        for task in rest:
            other: nn.Module = self.backbone(task, seed).model
            for owner, modules in heads.items():
                modules.append(other.get_submodule(owner))
        for owner, modules in heads.items():
            parent, _, leaf = owner.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Heads(modules))
        turn_to(model, 0, first)
        backbone.head = frozenset(
            f"{name.rpartition('.')[0]}.of.{k}.{name.rpartition('.')[2]}"
            for name in backbone.head for k in range(len(self.tasks)))
        return backbone

    def _encoded(self) -> Mapping[str, Mixture]:
        return {split: Mixture(tuple(self.encode(task.splits[split]) for task in self.tasks),
                               self.weights)
                for split in SPLITS if all(split in task.splits for task in self.tasks)}

    def loss(self, model: nn.Module, precision: str | None = None) -> Callable[[Batch], Tensor]:
        plain = super().loss(model, precision)

        def loss(batch: Batch) -> Tensor:
            number = int(batch[MARK])
            turn_to(model, number, self.tasks[number])
            return plain({name: value for name, value in batch.items() if name != MARK})

        return loss

    def fit_head(self, model: nn.Module, encoded: Any, seed: int) -> None:
        for k, (task, part) in enumerate(zip(self.tasks, encoded.parts, strict=True)):
            turn_to(model, k, task)
            super().fit_head(model, part, seed)

    def measure(self, model: nn.Module, encoded: Any) -> dict[str, float]:
        s, found, mean = self.settings, dict[str, float](), 0.0
        for k, (task, part) in enumerate(zip(self.tasks, encoded.parts, strict=True)):
            turn_to(model, k, task)
            own = evaluate(model, part, task.metrics, 4 * s.batch_size, s.precision)
            found |= {f"{task.name}/{metric}": value for metric, value in own.items()}
            mean += self.weights[k] * own[task.metrics[0]]
        return {"mean": mean, **found}

    def trained(self, spec: Spec) -> Trained:
        parts = tuple(self.about(spec, task) for task in self.tasks)
        return self.about(spec, self.task).model_copy(update={"parts": parts})


def _weights(text: str | None, count: int) -> tuple[float, ...]:
    """`2,1` as shares that sum to 1; equal ones for None."""
    try:
        given = [float(part) for part in text.split(",")] if text else [1.0] * count
    except ValueError:
        given = []
    if len(given) != count or not all(0 < w < float("inf") for w in given):
        raise InputError(f"--task-weights must be {count} numbers > 0, one for each task, as in "
                         f"{','.join(['1'] * count)}, but got {text!r}")
    return tuple(w / sum(given) for w in given)

"""A session: one backbone on one task, ready to search and to train on; and how to train.

Every training goes through `Session.fit`, so methods that are compared share data order, steps,
schedule, evaluation and head initialisation.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from searchpet.apply import (
    Trained,
    apply,
    grafts,
    has_masks,
    name_labels,
    save_delta,
    write_tensors,
)
from searchpet.backbone import Backbone, load_backbone
from searchpet.batch import Batch, Encoded, Encodings, encode
from searchpet.calibrate import HEAD_LR, Calibration, Parts, groups, lowered
from searchpet.device import EMULATED, has_bf16
from searchpet.errors import InputError, SlowWarning
from searchpet.grafts import Grafts
from searchpet.latency import Table
from searchpet.launch import check_rows, device
from searchpet.linear_probe import ROWS, fit_output
from searchpet.outside import Attached, Outside
from searchpet.processes import from_first, rank
from searchpet.recovery import Objective, maps_of
from searchpet.run import Listener, RunFolder, StageLoop, silent
from searchpet.settings import TAU, Settings
from searchpet.spec import Spec
from searchpet.task import Split, Task, load_task
from searchpet.train import Outcome, Recipe, evaluate, fit, logits_of, loss_of

FULL_LR = 1e-3  # x tau = 5e-5 for full fine-tuning, a usual rate for a small encoder
PROBE_ROWS = 8


class Session:
    """A backbone and an encoded task.  The model is handed out by `fresh`, one user at a time.

    teaching: (model, batch) -> the loss that specs are trained on, where it is not the task's.
    table: latencies that prices are taken from, where that was measured before.
    """

    def __init__(self, settings: Settings, listener: Listener = silent) -> None:
        self.settings, self.listener = settings, listener
        self.job = ""  # what the listener is told of whose stage runs
        check_rows(settings.batch_size)
        self.device = device(settings.device)
        if settings.precision == "bf16" and not has_bf16(self.device) and rank() == 0:
            warnings.warn(EMULATED, SlowWarning, stacklevel=2)
        self.task: Task = self._task()
        backbone = self._load(settings.seed)
        self.identity, self.head = backbone.identity, backbone.head
        self.tokenizer = backbone.tokenizer
        self.head_size = sum(
            p.numel() for n, p in backbone.model.named_parameters() if n in self.head)
        self.splits: Mapping[str, Encodings] = self._encoded()
        self.teaching: Callable[[nn.Module, dict[str, Tensor]], Objective] | None = None
        self.table: Table | None = None
        self.evaluations = Recipe.evaluations  # of a training, after the first
        self._backbone: Backbone | None = backbone
        self._seed = settings.seed
        self._stages: list[StageLoop] = []

    def _task(self) -> Task:
        return self.read(self.settings.task)

    def read(self, name: str) -> Task:
        """A task by name, from where the settings say."""
        return load_task(name, data=Path(self.settings.data) if self.settings.data else None)

    def _encoded(self) -> Mapping[str, Encodings]:
        return {name: self.encode(split) for name, split in self.task.splits.items()}

    def encode(self, split: Split) -> Encoded:
        return encode(split, self.tokenizer, self.settings.max_length)

    def _load(self, seed: int) -> Backbone:
        return self.backbone(self.task, seed)

    def backbone(self, task: Task, seed: int) -> Backbone:
        """The backbone with a head for a task, on the session's device."""
        backbone = load_backbone(self.settings.model, outputs=task.outputs,
                                 regression=task.type == "regression", seed=seed)
        model: nn.Module = backbone.model
        name_labels(model, task.labels)
        model.to(self.device)
        return backbone

    def load(self, seed: int) -> nn.Module:
        """A model of its own, apart from the one that `fresh` hands out."""
        model: nn.Module = self._load(seed).model
        return model

    @contextmanager
    def fresh(self, seed: int, spoil: bool = False) -> Iterator[nn.Module]:
        """The pretrained model with the head that `seed` draws.

        The frozen part is shared between users; `spoil` says that this one will change it, so
        that the next gets a newly loaded one.
        """
        if self._backbone is None or self._seed != seed:
            self._backbone, self._seed = self._load(seed), seed
        model: nn.Module = self._backbone.model
        start = {n: p.detach().clone() for n, p in model.named_parameters() if n in self.head}
        owners: list[Any] = [m for m in model.modules() if hasattr(m, "set_attn_implementation")]
        attention = [(m.config, m.config._attn_implementation) for m in owners]
        try:
            yield model
        finally:
            for config, name in attention:  # a user may have asked for plain attention
                config._attn_implementation = name
            if spoil:
                self._backbone = None
            else:
                self._restore(model, start)

    @staticmethod
    @torch.no_grad()
    def _restore(model: nn.Module, start: Mapping[str, Tensor]) -> None:
        grafts = getattr(model, "searchpet", None)
        if isinstance(grafts, Grafts):
            grafts.detach()
            del model.searchpet
        for name, parameter in model.named_parameters():
            parameter.grad = None
            if name in start:
                parameter.copy_(start[name])

    def batches(self, encoded: Encodings, seed: int) -> Any:
        """batches[step] is a batch."""
        return encoded.batches(self.settings.batch_size, seed)

    def loss(self, model: nn.Module, precision: str | None = None) -> Callable[[Batch], Tensor]:
        """batch -> loss."""
        return loss_of(model, precision or self.settings.precision)

    def loop(self, folder: RunFolder | None, stage: str, steps: int, seed: int,
             **state: Any) -> StageLoop:
        job = self.job
        self._stages.append(StageLoop(
            folder, stage, steps, seed, torch.Generator(),
            lambda event: self.listener(replace(event, job=job)), state))
        return self._stages[-1]

    def clock(self) -> Callable[[], float]:
        """Gives, once, seconds from now on, with those that went into the checkpoints from which
        stages since then go on: what was killed and resumed took as long as both parts.
        """
        began, self._stages = time.monotonic(), []

        def seconds() -> float:
            before = sum(stage.before for stage in self._stages)
            self._stages.clear()  # they hold what was trained
            return round(time.monotonic() - began + before, 3)

        return seconds

    def fit_head(self, model: nn.Module, encoded: Any, seed: int) -> None:
        """Fit the head's last layer to what the model, as it is, makes of some training rows."""
        size = 4 * self.settings.batch_size
        source = encoded.batches(size, seed)
        batches = [source[i] for i in range(-(-min(ROWS, len(encoded)) // size))]
        model.eval()
        own = {n: p for n, p in model.named_parameters() if n in self.head}

        def fitted() -> dict[str, Tensor]:
            fit_output(model, own, batches, logits_of(model, self.settings.precision))
            return {n: p.detach().cpu() for n, p in own.items()}

        with torch.no_grad():
            for name, value in from_first(fitted).items():
                own[name].copy_(value)

    def calibration(self, model: nn.Module, grafts: Parts, encoded: Encodings, seed: int,
                    ) -> Calibration:
        """Learning rates for what is grafted on the model, by a few rows."""
        batch = encoded.batches(PROBE_ROWS, seed)[0]
        model.eval()
        loss = self.loss(model, "fp32")
        return Calibration(model, grafts, lambda: loss(batch), self.head, self.settings.lr)

    def fit(self, method: Spec | Outside | str, folder: RunFolder | None, seed: int, *,
            tau: float | None = None, stage: str = "train", test: bool = False,
            after: Callable[[nn.Module], None] | None = None,
            start: Mapping[str, Tensor] | None = None, until: int | None = None) -> Outcome:
        """Train a spec, another library's method, or `full` or `head`, and keep the best
        validation checkpoint.

        start: values of a spec's deltas and of the head to begin with, named as in
        delta.safetensors; fresh ones by default.
        until: pause after so many steps; the next call with this folder and stage goes on.
        Writes delta.safetensors of a spec to `folder`, if it is not paused; `after` is given the
        trained model.
        Test data is touched here alone, once, after the checkpoint is chosen, and only if `test`
        is set.
        """
        tau = self.settings.tau if tau is None else tau
        clock = self.clock()
        prunes = isinstance(method, Spec) and method.keep is not None
        spoils = method == "full" or prunes or isinstance(method, Outside)
        with self.fresh(seed, spoil=spoils) as model:
            if isinstance(method, Spec):
                apply(model, method, head=self.head, seed=seed, remove=None)
            given: Spec | Attached | str = (
                method.attach(model, self.head, self.settings.steps, seed)
                if isinstance(method, Outside) else method)
            attached = given if isinstance(given, Attached) else None
            self.fit_head(model, self.splits["train"], seed)
            groups = self._groups(model, given, seed, tau)
            count = sum(p.numel() for group in groups for p in group["params"])
            if isinstance(method, Spec):  # of sparse deltas what is not 0 for good
                count = self.head_size + sum(g.parameters for g in grafts(model).grafts)
            if start is not None:
                write_tensors(model, self.head, start, "what is inherited")
            batches = self.batches(self.splits["train"], seed)
            loss = self.loss(attached.loss_model if attached else model)
            if self.teaching is not None and isinstance(method, Spec):
                objective = self.teaching(model, batches[0])
                loss = objective.loss
                groups += maps_of(objective)
            result = fit(
                model, groups, batches, self.recipe(), loss,
                lambda: self.evaluate(model, "validation"),
                lambda steps, **state: self.loop(folder, stage, steps, seed, **state),
                course=attached.course if attached else None, until=until)
            if after is not None:
                after(model)
            tested = self.evaluate(model, "test") if test else None
            written = None
            if folder is not None and isinstance(method, Spec) and until is None:
                written = save_delta(folder, model, self.head, self.trained(method))
            removed = prunes and not has_masks(model)
        trained = self.identity.parameters if method == "full" else count - self.head_size
        trained = attached.kept() if attached else trained
        return Outcome(
            result.metrics[self.task.metrics[0]], result.metrics, tested, trained,
            self.head_size, tau, result.step, clock(), removed,
            written, result.history[0][1], tuple(result.history),
            attached.most if attached else None)

    def _groups(self, model: nn.Module, method: Spec | Attached | str, seed: int, tau: float,
                ) -> list[dict[str, Any]]:
        """What trains, with learning rates."""
        head = [p for n, p in model.named_parameters() if n in self.head]
        if not isinstance(method, str):
            own: Parts = grafts(model) if isinstance(method, Spec) else method
            measured = self.calibration(model, own, self.splits["train"], seed)
            found = measured.rates(tau)
            found = lowered(found, measured.room(found, tau))
            return groups([g for g in own.grafts if any(True for _ in g.delta.parameters())],
                          head, found)
        for name, p in model.named_parameters():
            p.requires_grad_(method == "full" or name in self.head)
        if method == "head":
            return [{"params": head, "kind": "head", "lr": HEAD_LR * tau / TAU}]
        rest = [p for n, p in model.named_parameters() if n not in self.head]
        lr = self.settings.lr or FULL_LR * tau
        return [{"params": rest, "kind": "full", "lr": lr},
                {"params": head, "kind": "head", "lr": HEAD_LR}]

    def recipe(self) -> Recipe:
        s = self.settings
        return Recipe(steps=s.steps, batch_size=s.batch_size, accumulate=s.accumulate,
                      precision=s.precision, evaluations=self.evaluations)

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """Metrics on a split.  Raises InputError when the task has none with labels."""
        encoded = self.splits.get(split)
        if encoded is None or encoded.labels is None:
            labelled = ", ".join(n for n, e in self.splits.items() if e.labels is not None)
            raise InputError(f"a {split} score needs a labelled {split} split, but task "
                             f"{self.task.name} has {labelled}")
        return self.measure(model, encoded)

    def measure(self, model: nn.Module, encoded: Any) -> dict[str, float]:
        """Metrics on encoded rows with labels, the score first."""
        s = self.settings
        return evaluate(model, encoded, self.task.metrics, 4 * s.batch_size, s.precision)

    def trained(self, spec: Spec) -> Trained:
        """What delta.safetensors says of itself."""
        return self.about(spec, self.task)

    def about(self, spec: Spec, t: Task) -> Trained:
        """What a task's part in delta.safetensors is for."""
        return Trained(spec_hash=spec.hash, task=t.name, type=t.type, fields=t.fields,
                       labels=t.labels, metrics=t.metrics, max_length=self.settings.max_length)

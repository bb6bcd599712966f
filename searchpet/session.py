"""A session: one backbone on one task, ready to search and to train on; and how to train.

Every training goes through `Session.fit`, so methods that are compared share data order, steps,
schedule, evaluation and head initialisation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from searchpet.apply import Trained, apply, grafts, has_masks, name_labels, save_delta
from searchpet.backbone import DEFAULT, Backbone, load_backbone
from searchpet.batch import Batches, Encoded, encode
from searchpet.calibrate import probe, rates
from searchpet.errors import InputError, unknown
from searchpet.grafts import Grafts
from searchpet.latency import Table
from searchpet.recovery import Objective, maps_of
from searchpet.run import Listener, RunFolder, StageLoop, silent
from searchpet.spec import Spec
from searchpet.task import Task, load_task
from searchpet.train import Recipe, evaluate, fit, loss_of

TAU = 0.1  # relative output change per step; on TREC-6 at 0.01 % 0.03 and 0.3 did worse, one seed
HEAD_LR = 5e-3  # of the freshly initialised output layer, whatever the method
FULL_LR = 1e-3  # x tau = 1e-4 for full fine-tuning, the usual rate for a small encoder
SWEEP = (1 / 3, 1.0, 3.0)  # factors on tau that `--sweep` tries
PROBE_ROWS = 8


@dataclass(frozen=True)
class Settings:
    """What the user asked for, validated; the same values on --resume."""

    model: str = DEFAULT
    task: str = "agreement"
    data: str | None = None
    seed: int = 0
    steps: int = 300
    batch_size: int = 32
    accumulate: int = 1
    max_length: int = 64
    tau: float = TAU
    lr: float | None = None
    precision: str = "fp32"
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} must be >= 1, but got "
                                 f"{getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed must be in [0, 2^63), but got {self.seed}")
        for name in ("tau", "lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"--{name} must be a finite number > 0, but got {value}")
        if self.precision not in ("fp32", "bf16"):
            raise unknown("--precision", self.precision, ("fp32", "bf16"))


def pick_device(name: str) -> torch.device:
    """`auto` is cuda, else mps, else cpu.  Raises InputError for a device that is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device must be auto, cpu, or a cuda or mps device that is there, but "
                         f"got {name!r}") from error
    return device


@dataclass(frozen=True)
class Outcome:
    """A finished training: validation score, test metrics if asked for, counts, time.

    removed: whether what the spec prunes was really taken out; False if masked or nothing.
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


class Session:
    """A backbone and an encoded task.  The model is handed out by `fresh`, one user at a time.

    teaching: (model, batch) -> the loss that specs are trained on, where it is not the task's.
    table: latencies that prices are taken from, where that was measured before.
    """

    def __init__(self, settings: Settings, listener: Listener = silent) -> None:
        self.settings, self.listener = settings, listener
        self.job = ""  # what the listener is told of whose stage runs
        self.device = pick_device(settings.device)
        self.task: Task = load_task(
            settings.task, data=Path(settings.data) if settings.data else None)
        backbone = self._load(settings.seed)
        self.identity, self.head = backbone.identity, backbone.head
        self.tokenizer = backbone.tokenizer
        self.head_size = sum(
            p.numel() for n, p in backbone.model.named_parameters() if n in self.head)
        self.splits: dict[str, Encoded] = {
            name: encode(split, self.tokenizer, settings.max_length)
            for name, split in self.task.splits.items()
        }
        self.teaching: Callable[[nn.Module, dict[str, Tensor]], Objective] | None = None
        self.table: Table | None = None
        self._backbone: Backbone | None = backbone
        self._seed = settings.seed

    def _load(self, seed: int) -> Backbone:
        backbone = load_backbone(self.settings.model, outputs=self.task.outputs,
                                 regression=self.task.type == "regression", seed=seed)
        model: nn.Module = backbone.model
        name_labels(model, self.task.labels)
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
        try:
            yield model
        finally:
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

    def batches(self, encoded: Encoded, seed: int) -> Batches:
        return Batches(encoded, self.settings.batch_size, seed)

    def loop(self, folder: RunFolder | None, stage: str, steps: int, seed: int,
             **state: Any) -> StageLoop:
        job = self.job
        return StageLoop(folder, stage, steps, seed, torch.Generator(),
                         lambda event: self.listener(replace(event, job=job)), state)

    def probe(self, model: nn.Module, grafts: Grafts, encoded: Encoded, seed: int,
              ) -> dict[str, float]:
        """Relative output change per unit of learning rate, by kind, on one small batch."""
        batch = Batches(encoded, PROBE_ROWS, seed)[0]
        model.eval()
        loss = loss_of(model, "fp32")
        return probe(grafts, lambda: loss(batch))

    def rates(self, probes: dict[str, float], tau: float) -> dict[str, float]:
        """Learning rate of each kind and of the head."""
        fixed = {"head": HEAD_LR}
        if self.settings.lr is not None:
            fixed.update(dict.fromkeys(probes, self.settings.lr))
        return rates(probes, tau, fixed)

    def fit(self, method: Spec | str, folder: RunFolder | None, seed: int, *,
            tau: float | None = None, stage: str = "train", test: bool = False,
            after: Callable[[nn.Module], None] | None = None) -> Outcome:
        """Train a spec, or `full` or `head`, and keep the best validation checkpoint.

        Writes delta.safetensors of a spec to `folder`; `after` is given the trained model.
        Test data is touched here alone, once, after the checkpoint is chosen, and only if `test`
        is set.
        """
        tau = self.settings.tau if tau is None else tau
        began = time.monotonic()
        spoils = method == "full" or (isinstance(method, Spec) and method.keep is not None)
        with self.fresh(seed, spoil=spoils) as model:
            groups = self._groups(model, method, seed, tau)
            count = sum(p.numel() for group in groups for p in group["params"])
            if isinstance(method, Spec):  # of sparse deltas what is not 0 for good
                count = self.head_size + sum(g.parameters for g in grafts(model).grafts)
            batches = self.batches(self.splits["train"], seed)
            loss = loss_of(model, self.settings.precision)
            if self.teaching is not None and isinstance(method, Spec):
                objective = self.teaching(model, batches[0])
                loss = objective.loss
                groups += maps_of(objective)
            result = fit(
                model, groups, batches, self.splits["validation"], self.task.metrics,
                self.recipe(), loss,
                lambda steps, **state: self.loop(folder, stage, steps, seed, **state))
            if after is not None:
                after(model)
            tested = self.evaluate(model, "test") if test else None
            if folder is not None and isinstance(method, Spec):
                save_delta(folder, model, self.head, self.trained(method))
            removed = spoils and method != "full" and not has_masks(model)
        trained = self.identity.parameters if method == "full" else count - self.head_size
        return Outcome(
            result.metrics[self.task.metrics[0]], result.metrics, tested, trained,
            self.head_size, tau, result.step, round(time.monotonic() - began, 3), removed)

    def sweep(self, method: Spec | str, folder: RunFolder | None, seed: int,
              ) -> list[tuple[float, float]]:
        """(tau, validation score) for each factor of SWEEP; the folder keeps what is done."""
        done = folder.read_json("sweep.json") if folder and folder.has("sweep.json") else []
        for factor in SWEEP[len(done):]:
            tau = self.settings.tau * factor
            sub = folder.sub(f"sweep-{len(done)}") if folder else None
            done.append([tau, self.fit(method, sub, seed, tau=tau, stage="sweep").score])
            if folder:
                folder.write_json("sweep.json", done)
        return [tuple(pair) for pair in done]

    def _groups(self, model: nn.Module, method: Spec | str, seed: int, tau: float,
                ) -> list[dict[str, Any]]:
        """What trains, with learning rates."""
        head = [p for n, p in model.named_parameters() if n in self.head]
        rest = [p for n, p in model.named_parameters() if n not in self.head]
        if isinstance(method, Spec):
            apply(model, method, head=self.head, seed=seed, remove=None)
            own = grafts(model)
            found = self.rates(self.probe(model, own, self.splits["train"], seed), tau)
            kinds: dict[str, list[Any]] = {}
            for graft in own.grafts:
                if graft.delta.neutral == 0:
                    kinds.setdefault(graft.kind, []).extend(graft.delta.parameters())
            groups = [{"params": p, "kind": k, "lr": found[k]} for k, p in kinds.items()]
            return [*groups, {"params": head, "kind": "head", "lr": HEAD_LR}]
        for p in rest:
            p.requires_grad_(method == "full")
        for p in head:
            p.requires_grad_(True)
        if method == "head":
            return [{"params": head, "kind": "head", "lr": HEAD_LR * tau / TAU}]
        lr = self.settings.lr or FULL_LR * tau
        return [{"params": rest, "kind": "full", "lr": lr},
                {"params": head, "kind": "head", "lr": HEAD_LR}]

    def recipe(self) -> Recipe:
        s = self.settings
        return Recipe(steps=s.steps, batch_size=s.batch_size, accumulate=s.accumulate,
                      precision=s.precision)

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """Metrics on a split.  Raises InputError when the task has none with labels."""
        encoded = self.splits.get(split)
        if encoded is None or encoded.labels is None:
            labelled = ", ".join(n for n, e in self.splits.items() if e.labels is not None)
            raise InputError(f"a {split} score needs a labelled {split} split, but task "
                             f"{self.task.name} has {labelled}")
        s = self.settings
        return evaluate(model, encoded, self.task.metrics, 4 * s.batch_size, s.precision)

    def trained(self, spec: Spec) -> Trained:
        """What delta.safetensors says of itself."""
        t = self.task
        return Trained(spec_hash=spec.hash, task=t.name, type=t.type, fields=t.fields,
                       labels=t.labels, metrics=t.metrics, max_length=self.settings.max_length)


def asked(settings: Settings, **more: Any) -> dict[str, Any]:
    """The settings as plain values for settings.json; `data` only if the task lies in it."""
    inside = settings.data and (Path(settings.data) / settings.task).is_dir()
    return {**asdict(settings), "data": settings.data if inside else None, **more}

"""The run folder: atomic files, and loops that survive kill -9.

Files: settings.json (what was asked), spec.json, delta.safetensors, result.json, log.jsonl, and
while a stage is under way its checkpoint, NAME.checkpoint.safetensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from searchpet import processes
from searchpet.device import free
from searchpet.errors import InputError

# what a run may leave that stopped before it began
BEFORE = ("settings.json", "log.jsonl", "latency.json")
LOG_EVERY = 10  # steps between two lines of log.jsonl
# what every result.json has
RESULT = ("task", "metric", "split", "score", "strategy", "trainable", "head", "backbone",
          "fraction", "budget_limit", "spec_hash", "keep", "removed", "tensors", "seed", "seconds")


@dataclass(frozen=True)
class Event:
    """What a listener is told after a step: where the run is and how fast it goes.

    job says whose stage it is, such as a control's name; step counts from 1; rate is steps per
    second since this process took up the stage; left is the expected rest of the stage in seconds.
    """

    stage: str
    step: int
    steps: int
    rate: float
    left: float
    figures: Mapping[str, float] = field(default_factory=dict)
    job: str = ""


Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """A listener that says nothing."""


class RunFolder:
    """A folder of one run.  Every file is written whole or not at all."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def start(self, settings: Mapping[str, Any], resume: bool) -> None:
        """Open the folder for the run that `settings` describe.

        A run that stopped before it had a file beside its settings, over wrong input say, does
        not count.  Raises InputError when the folder holds something and `resume` is off, or
        holds another run.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"--out must be a folder, but {self.path} is a file")
        used = self.path.is_dir() and any(
            file.name not in BEFORE for file in self.path.iterdir())
        if used and not resume:
            raise InputError(f"--out must be a new or empty folder, but {self.path} is not empty; "
                             "add --resume to continue it, or name another")
        if used:
            self._same(settings)
            return
        self.drop("latency.json")  # of other settings, perhaps
        self.path.mkdir(parents=True, exist_ok=True)
        self.write_json("settings.json", settings)

    def _same(self, settings: Mapping[str, Any]) -> None:
        if not self.has("settings.json"):
            raise InputError(f"--resume must continue a run, but {self.path} holds other files; "
                             "name another --out")
        before = self.read_json("settings.json")
        now = json.loads(json.dumps(settings))
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                raise InputError(
                    f"--resume must continue the same run, but {key} was {before.get(key)!r} in "
                    f"{self.path} and is {now.get(key)!r} now; repeat the first command or name "
                    "another --out")

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def sub(self, name: str) -> RunFolder:
        """A run inside this one, such as a control."""
        folder = RunFolder(self.path / name)
        folder.path.mkdir(parents=True, exist_ok=True)
        return folder

    def write_json(self, name: str, content: Any) -> None:
        self.write_text(name, json.dumps(content, indent=1, allow_nan=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, content: bytes) -> None:
        self._replace(name, lambda partial: partial.write_bytes(content))

    def read_json(self, name: str) -> Any:
        """Raises InputError when the file is absent or not JSON."""
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(f"a run folder must hold {name}, but {self.path} does not") from error
        except ValueError as error:
            raise InputError(f"{self.path / name} must be JSON, but is not: {error}") from error

    def result(self) -> dict[str, Any]:
        """result.json.  Raises InputError when it is absent or not that of a finished run."""
        found = self.read_json("result.json")
        lacks = [name for name in RESULT if not isinstance(found, dict) or name not in found]
        if lacks:
            raise InputError(f"{self.path / 'result.json'} must be that of a run, but has no "
                             f"{lacks[0]}; it was edited or damaged, train the spec again")
        return dict(found)

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor],
                      metadata: Mapping[str, str] | None = None) -> None:
        own = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        # save_file would make it readable by its owner alone
        self.write_bytes(name, save(own, dict(metadata or {})))

    def digest(self, name: str) -> str:
        """sha256 of a file, in hex."""
        return hashlib.sha256((self.path / name).read_bytes()).hexdigest()

    def read_tensors(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata.  Raises InputError when the file is absent or damaged."""
        path = self.path / name
        if not path.is_file():
            raise InputError(f"a run folder must hold {name}, but {self.path} does not")
        try:
            with safe_open(path, framework="pt") as file:
                keys = file.keys()
                return {key: file.get_tensor(key) for key in keys}, dict(file.metadata() or {})
        except (SafetensorError, ValueError) as error:
            raise InputError(f"{path} must be a safetensors file, but is damaged: {error}; "
                             "delete it and run again with --resume") from error

    def drop(self, pattern: str) -> None:
        """Delete files by name, in which * stands for anything."""
        for file in self.path.glob(pattern):
            file.unlink(missing_ok=True)

    def log(self, **line: Any) -> None:
        """Append a line to log.jsonl."""
        with (self.path / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _replace(self, name: str, write: Callable[[Path], Any]) -> None:
        target = self.path / name
        partial = target.with_name(target.name + ".partial")
        try:
            write(partial)
            os.replace(partial, target)
        except BaseException as error:
            with contextlib.suppress(OSError):  # as where nothing may be written
                partial.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno:  # a full disk's does not say where
                raise OSError(error.errno, error.strerror, str(target)) from error
            raise


class StageLoop:
    """Steps of a stage, restored from and saved to a checkpoint in the run folder.

    `state` names what changes from step to step: tensors, lists of tensors, optimizers, and dicts
    of plain values.  Before each step all randomness is seeded from (seed, stage, step), so data
    order, dropout and gates need no state of their own, and an interrupted stage continues to the
    same numbers.  Of several processes the first saves; each has dropout of its own, and the same
    `generator`.  before: seconds that went into the checkpoint it goes on from, unless it was
    paused there.
    """

    def __init__(self, folder: RunFolder | None, stage: str, steps: int, seed: int,
                 generator: torch.Generator, listener: Listener = silent,
                 state: Mapping[str, Any] | None = None, every: float = 20.0) -> None:
        self.folder, self.stage, self.steps, self.seed = folder, stage, steps, seed
        self.generator, self.listener, self.every = generator, listener, every
        self.state = dict(state or {})
        self.stopped = self.paused = False
        self._step, self.before = 0, 0.0
        self._unread: Mapping[str, float | Tensor] = {}
        self._plain: dict[str, float] = {}

    @property
    def file(self) -> str:
        return f"{self.stage}.checkpoint.safetensors"

    def __iter__(self) -> Iterator[int]:
        first = self._restore()
        self._first, self._began = first, time.monotonic()
        saved = self._began
        for step in range(first, self.steps):
            if self.stopped:
                return
            self._step = step
            own = f"{self.stage}@{rank}" if (rank := processes.rank()) else self.stage
            torch.manual_seed(_mix(self.seed, own, step))
            self.generator.manual_seed(_mix(self.seed, self.stage, step))
            yield step
            if self.paused:
                self._save(step + 1, paused=True)
                return
            if time.monotonic() - saved > self.every:
                self._save(self.steps if self.stopped else step + 1)
                saved = time.monotonic()

    def report(self, **figures: float | Tensor) -> None:
        """Tell the listener how the step went, or, of figures that an accelerator is still busy
        with, how the last one went that they were read of.

        Raises InputError for a loss that is not finite.
        """
        done = self._step + 1
        logs = done % LOG_EVERY == 0 or done == self.steps
        self._unread = figures
        if logs or not self._plain or all(
                free(v) for v in figures.values() if isinstance(v, Tensor)):
            self._read()
        rate = (done - self._first) / max(time.monotonic() - self._began, 1e-9)
        if self.folder and logs:
            self.folder.log(stage=self.stage, step=done, **self._plain)
        left = (self.steps - done) / rate
        self.listener(Event(self.stage, done, self.steps, rate, left, self._plain))

    def _read(self) -> None:
        """The figures of the last step as numbers.  Raises InputError as `report` does."""
        self._plain = {name: float(v.detach() if isinstance(v, Tensor) else v)
                       for name, v in self._unread.items()}
        loss = self._plain.get("loss", 0.0)
        if loss != loss or abs(loss) == float("inf"):
            raise InputError(
                f"the loss must stay finite, but step {self._step} of {self.stage} gave {loss}; "
                "try a smaller --tau, or --precision fp32")

    def stop(self) -> None:
        """No further steps."""
        self.stopped = True

    def pause(self) -> None:
        """No further steps now; the next loop of the same stage goes on from here."""
        self.paused = True

    def finish(self) -> None:
        """The stage's result is saved elsewhere: the checkpoint is no longer needed."""
        if self.folder:
            self.folder.drop(self.file)

    def _save(self, step: int, paused: bool = False) -> None:
        if self.folder and processes.first():
            self._read()  # nothing of a loss that is not finite is kept
            tensors, plain = pack(self.state)
            spent = 0.0 if paused else self.before + time.monotonic() - self._began
            meta = {"step": str(step), "plain": json.dumps(plain), "seconds": f"{spent:.3f}"}
            self.folder.write_tensors(self.file, tensors, meta)

    def _restore(self) -> int:
        if not self.folder or not self.folder.has(self.file):
            return 0
        tensors, meta = self.folder.read_tensors(self.file)
        unpack(self.state, tensors, json.loads(meta["plain"]))
        self.before = float(meta.get("seconds", 0.0))
        return int(meta["step"])


def pack(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State objects -> flat tensors and plain values."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, list):
            tensors.update({f"{name}/{i}": v for i, v in enumerate(value)})
        elif isinstance(value, torch.optim.Optimizer):
            for i, held in value.state_dict()["state"].items():
                tensors.update({f"{name}/{i}/{k}": torch.as_tensor(v) for k, v in held.items()})
        else:
            plain[name] = value
    return tensors, plain


@torch.no_grad()
def unpack(state: Mapping[str, Any], tensors: Mapping[str, Tensor],
           plain: Mapping[str, Any]) -> None:
    """Write saved values back into the state objects, in place."""
    for name, value in state.items():
        if isinstance(value, Tensor):
            value.copy_(tensors[name])
        elif isinstance(value, list):
            for i, v in enumerate(value):
                v.copy_(tensors[f"{name}/{i}"])
        elif isinstance(value, torch.optim.Optimizer):
            slots: dict[int, dict[str, Tensor]] = {}
            for key, tensor in tensors.items():
                if key.startswith(name + "/"):
                    _, number, slot = key.split("/")
                    slots.setdefault(int(number), {})[slot] = tensor
            groups = value.state_dict()["param_groups"]
            value.load_state_dict({"state": slots, "param_groups": groups})
        else:
            value.clear()
            value.update(plain[name])


def _mix(seed: int, stage: str, step: int) -> int:
    digest = hashlib.sha256(f"{seed}:{stage}:{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1

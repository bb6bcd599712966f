"""Several workers of one study on this machine: started, watched, started again, stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from optuna.study import Study

from searchpet.errors import InputError
from searchpet.roster import Standing, standing, take_back

STARTS = 3  # of a worker that was killed
PAUSE = 1.0  # seconds between two looks
GRACE = 20.0  # seconds that workers have to end their trials after Ctrl-C


@dataclass(frozen=True)
class Crew:
    """What workers need to know to join a study."""

    storage: str
    study: str
    folder: Path
    jobs: int
    artifacts: str
    data: str | None = None
    device: str = "auto"
    plugins: tuple[str, ...] = ()

    def command(self) -> list[str]:
        """The command line of a worker; the storage is in its environment: it may hold a
        password.
        """
        data = ["--data", self.data] if self.data else []
        plugins = [word for name in self.plugins for word in ("--plugin", name)]
        return [sys.executable, "-m", "searchpet", "tune", "--worker", "--study", self.study,
                "--out", str(self.folder), "--device", self.device, *data, *plugins, "--quiet"]


@dataclass
class Member:
    """A worker's process, and how often it was started."""

    number: int
    process: subprocess.Popen[bytes]
    starts: int = 1


@dataclass
class _Watch:
    crew: Crew
    study: Study
    say: Callable[[str], None]
    members: list[Member] = field(default_factory=list)
    said: int = -1
    began: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self._first = standing(self.study).finished  # of an earlier time, if it goes on

    def start(self, number: int) -> subprocess.Popen[bytes]:
        with _log(self.crew, number).open("ab") as log:
            return subprocess.Popen(self.crew.command(), stdout=log, stderr=log,
                                    env=_environment(self.crew, number))

    def restart(self) -> None:
        """Start killed workers again; those that ended by themselves are done."""
        for member in self.members:
            code = member.process.poll()
            if code is not None and code < 0 and member.starts < STARTS:
                member.process = self.start(member.number)
                member.starts += 1

    def living(self) -> bool:
        return any(member.process.poll() is None for member in self.members)

    def tell(self, now: Standing) -> None:
        """A line whenever a trial has ended."""
        if now.finished != self.said:
            self.said = now.finished
            wanted = int(self.study.user_attrs["trials"])
            left = ""
            if now.finished > self._first:
                pace = (time.time() - self.began) / (now.finished - self._first)
                left = f", about {pace * max(0, wanted - now.finished) / 60:.0f} min left"
            self.say(f"[{now.finished}/{wanted}{left}] {now.complete} complete, {now.pruned} "
                     f"pruned, {now.failed} failed, {now.running} running{self._best()}")

    def _best(self) -> str:
        """What the trials have come to."""
        if len(self.study.directions) > 1:
            return f"; {len(self.study.best_trials)} on the front"
        with suppress(ValueError):
            return f"; best {self.study.best_value:.6g}, trial {self.study.best_trial.number}"
        return ""

    def stop(self) -> None:
        """Let workers give their trials up; kill those that do not."""
        for member in self.members:
            if member.process.poll() is None:
                member.process.send_signal(signal.SIGINT)
        until = time.monotonic() + GRACE
        while self.living() and time.monotonic() < until:
            time.sleep(0.1)
        for member in self.members:
            member.process.kill()
            member.process.wait()
        take_back(self.study)


def run_workers(crew: Crew, study: Study, say: Callable[[str], None]) -> None:
    """Run workers until the study has all its trials, or none of them can go on.

    Raises InputError with a worker's last words where all of them failed.
    """
    watch = _Watch(crew, study, say)
    try:
        watch.members = [Member(i, watch.start(i)) for i in range(crew.jobs)]
        while watch.living():
            time.sleep(PAUSE)
            watch.restart()
            watch.tell(standing(study))
    except BaseException:
        watch.stop()
        raise
    take_back(study)  # of a worker that was killed too often
    if all(member.process.returncode for member in watch.members):
        words = _log(crew, 0).read_text(encoding="utf-8").strip().splitlines() or ["no word"]
        raise InputError(f"workers must end well, but all of {crew.jobs} failed, the first with: "
                         f"{words[-1].removeprefix('error: ')}; see {_log(crew, 0).parent}")


def _log(crew: Crew, number: int) -> Path:
    path = crew.folder / "workers" / f"{number}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _environment(crew: Crew, number: int) -> dict[str, str]:
    """A worker's share of the machine: cores, and one of the GPUs that this process may see."""
    found = {**os.environ, "SEARCHPET_STORAGE": crew.storage}
    threads = max(1, (os.cpu_count() or 1) // crew.jobs)
    found.setdefault("OMP_NUM_THREADS", str(threads))
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if crew.device in ("auto", "cuda"):
        import torch

        count = torch.cuda.device_count()
        names = [name for name in devices.split(",") if name] or [str(i) for i in range(count)]
        if names:
            found["CUDA_VISIBLE_DEVICES"] = names[number % len(names)]
    return found

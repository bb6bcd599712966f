"""Running the command line in tests: in this process, or in one that is killed on the way."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]

# checkpoints after every step, and a signal after the Nth report of a stage
DRIVER = """
import collections, functools, os, signal, sys
from searchpet import run, session
from searchpet.cli import main

name, stage, last = os.environ["SIGNAL"].split()
seen = collections.Counter()

class Loop(run.StageLoop):
    def __init__(self, *args):
        super().__init__(*args, every=0.0)

    def report(self, **figures):
        super().report(**figures)
        seen[self.stage] += 1
        if self.stage == stage and seen[stage] == int(last):
            os.kill(os.getpid(), getattr(signal, name))

session.StageLoop = Loop
sys.argv = ["searchpet", *sys.argv[1:]]
sys.exit(main())
"""


def cut_off(words: list[str], signal: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process that gets a signal: `SIGKILL train 7`."""
    environment = {**os.environ, "SIGNAL": signal, "PYTHONPATH": str(ROOT),
                   "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", DRIVER, *words], cwd=cwd, env=environment,
                          capture_output=True, text=True, check=False, timeout=300)


@contextmanager
def workplace(folder: Path, backbone: Path) -> Iterator[pytest.MonkeyPatch]:
    """Inside, the current folder has a task `films` and a backbone `tiny`."""
    write_task(folder / "films")
    (folder / "tiny").symlink_to(backbone)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes that are killed: the numbers must be the same
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.delenv("SEARCHPET_DATA", raising=False)
            yield patch
    finally:
        torch.set_num_threads(threads)


def write_task(folder: Path, rows: int = 48) -> Path:
    """A folder task that is easy to learn: is `good` or `bad` in the text?"""
    folder.mkdir()
    rng = random.Random(0)
    for split, count in (("train", rows), ("validation", rows // 2), ("test", rows // 2)):
        lines = []
        for i in range(count):
            words = rng.choices("the a of to film cat dog was is".split(), k=rng.randint(1, 4))
            text = " ".join([("bad ", "good ")[i % 2] * 2, *words, f"{split[:2]}{i}"])
            lines.append(json.dumps({"text": text, "label": i % 2}) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(lines))
    (folder / "meta.json").write_text('{"labels": ["neg", "pos"], "metrics": ["accuracy", "f1"]}')
    return folder

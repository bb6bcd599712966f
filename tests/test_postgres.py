"""A study in a real PostgreSQL: workers that are killed, and the address that is never shown."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from searchpet import cli
from searchpet.roster import WORKER, root, standing, trials_of
from searchpet.spec import Spec
from searchpet.study import join
from tests.commands import ROOT, workplace

ADDRESS = os.environ.get("SEARCHPET_POSTGRES", "")
pytestmark = pytest.mark.skipif(not ADDRESS, reason="SEARCHPET_POSTGRES names no server")

KNOBS = '''description = "two strategies without a search, many rates"
base = "nano"
[[knob]]
name = "strategy"
choices = ["random:unit", "uniform:bias"]
[[knob]]
name = "tau"
low = 0.03
high = 0.3
'''
JOB = ["tune", "--model", "tiny", "--task", "films", "--budget", "5%", "--steps", "20",
       "--batch-size", "8", "--device", "cpu", "--knobs", "knobs.toml"]
WORKERS, TRIALS, ROUNDS = 4, 24, 2


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("postgres")
    with workplace(folder, tiny_folder) as patch:
        (folder / "knobs.toml").write_text(KNOBS)
        patch.setenv("SEARCHPET_STORAGE", ADDRESS)
        yield folder


def work(study: str, folder: str, storage: str = ADDRESS) -> subprocess.Popen[str]:
    words = ["tune", "--worker", "--study", study, "--out", folder, "--device", "cpu", "-q"]
    return subprocess.Popen(
        [sys.executable, "-m", "searchpet", *words], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env={**os.environ, "SEARCHPET_STORAGE": storage,
                                       "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})


def server(verb: str, folder: str) -> str:
    """A database server of this file's own, started or stopped; its address."""
    done = subprocess.run([str(ROOT / ".ci" / "postgres"), verb, folder], check=True, text=True,
                          stdout=subprocess.PIPE)
    return done.stdout.strip()


def test_workers_that_are_killed_lose_and_double_nothing(place: Path) -> None:
    """Four workers on one study; in every round two of them are killed at random moments."""
    name = f"killed-{time.time_ns()}"
    assert cli.main([*JOB, "--study", name, "--trials", "1", "--out", "parent", "-q"]) == 0
    study = join(ADDRESS, name)
    study.set_user_attr("trials", TRIALS)
    rng = random.Random(0)
    crew = [work(name, "shared") for _ in range(WORKERS)]
    for _ in range(ROUNDS):
        while not (running := [t for t in trials_of(study) if t.state.name == "RUNNING"]):
            time.sleep(0.05)
        victims = {int(t.user_attrs[WORKER].split("/")[1]) for t in running
                   if WORKER in t.user_attrs} & {member.pid for member in crew}
        victims |= {rng.choice(crew).pid}
        for pid in sorted(victims)[:2]:
            time.sleep(rng.random())
            member = next(m for m in crew if m.pid == pid)
            member.send_signal(signal.SIGKILL)
            member.wait()
            crew[crew.index(member)] = work(name, "shared")
    for member in crew:
        text, _ = member.communicate(timeout=300)
        assert member.returncode == 0, text
    now = standing(study)
    assert (now.finished, now.running, now.waiting) == (TRIALS, 0, 0)
    ended = [root(t) for t in trials_of(study) if t.state.name in ("COMPLETE", "PRUNED")]
    assert len(ended) == len(set(ended)) == TRIALS
    for out in ("here", "there"):
        words = ["tune", "--collect", "--study", name, "--out", out, "--device", "cpu", "-q"]
        assert cli.main(words) == 0
    assert Spec.load("here").hash == Spec.load("there").hash
    result = json.loads(Path("here/result.json").read_text())
    assert result["score"] == max(t.value for t in trials_of(study) if t.value is not None)


def test_a_wrong_password_is_one_line_without_it(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head, _, tail = ADDRESS.rpartition("@")
    wrong = f"{head.rpartition(':')[0]}:not-the-password@{tail}"
    capsys.readouterr()
    assert cli.main([*JOB, "--storage", wrong, "--out", "refused", "-q"]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and "authentication failed" in text
    assert "not-the-password" not in text and ":***@" in text


def test_the_password_is_not_written_anywhere(place: Path) -> None:
    name = f"secret-{time.time_ns()}"
    assert cli.main([*JOB, "--study", name, "--trials", "1", "--out", "secret", "-q"]) == 0
    secret = ADDRESS.rpartition("@")[0].rpartition(":")[2]
    for file in (place / "secret").rglob("*"):
        assert not file.is_file() or secret.encode() not in file.read_bytes(), file


def test_a_server_that_stops_is_one_line_and_loses_nothing(place: Path) -> None:
    folder = tempfile.mkdtemp()  # not pytest's: the server's user must reach it
    storage = server("start", folder)
    try:
        words = [*JOB, "--study", "stopped", "--trials", "1", "--storage", storage]
        assert cli.main([*words, "--out", "stopped", "-q"]) == 0
        study = join(storage, "stopped")
        study.set_user_attr("trials", TRIALS)
        member = work("stopped", "others", storage)
        while standing(study).finished < 4:
            time.sleep(0.2)
        server("stop", folder)
        text, _ = member.communicate(timeout=120)
        assert member.returncode == 2
        assert text.count("\n") == 1, text
        assert text.startswith("error: a study's storage must answer to the end, but it stopped: ")
        assert storage.rpartition("@")[0].rpartition(":")[2] not in text
        assert server("start", folder) == storage
        study = join(storage, "stopped")
        before = {t.number for t in trials_of(study) if t.state.is_finished()}
        assert len(before) >= 4
        member = work("stopped", "others", storage)
        text, _ = member.communicate(timeout=300)
        assert member.returncode == 0, text
        now = standing(study)
        assert (now.finished, now.running, now.waiting, now.failed) == (TRIALS, 0, 0, 0)
        assert before <= {t.number for t in trials_of(study) if t.state.is_finished()}
    finally:
        server("stop", folder)
        shutil.rmtree(folder)

"""Workers behind `searchpet tune --serve`, a real proxy in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
import sqlalchemy

from searchpet import cli
from searchpet.failures import explain
from searchpet.roster import root, standing, trials_of
from searchpet.spec import Spec
from searchpet.study import join
from tests.commands import ROOT, workplace

pytest.importorskip("grpc", reason="grpcio is not installed: pip install 'searchpet[cluster]'")
JOB = ["tune", "--model", "tiny", "--task", "films", "--budget", "5%", "--steps", "20",
       "--batch-size", "8", "--device", "cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("grpc")
    with workplace(folder, tiny_folder):
        yield folder


def spawn(words: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "searchpet", *words], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment})


@pytest.fixture
def proxy(place: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Its address, and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served = spawn(["tune", "--serve", f"127.0.0.1:{port}", "--storage", "sqlite:///proxied.db"])
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with socket.socket() as knock:
            if knock.connect_ex(("127.0.0.1", port)) == 0:
                break
        assert served.poll() is None, served.communicate()[0]
        time.sleep(0.1)
    yield f"grpc://127.0.0.1:{port}", served
    served.kill()
    served.communicate()


def worker(storage: str, study: str) -> subprocess.Popen[str]:
    words = ["tune", "--worker", "--study", study, "--out", f"{study}-shared", "--device", "cpu",
             "-q"]
    return spawn(words, SEARCHPET_STORAGE=storage)


def begun(storage: str, study: str, trials: int) -> None:
    """A study behind the proxy that has had one trial and wants so many."""
    assert cli.main([*JOB, "--storage", storage, "--study", study, "--trials", "1", "--out", study,
                     "-q"]) == 0
    join(storage, study).set_user_attr("trials", trials)


@pytest.mark.slow
def test_workers_behind_a_proxy_share_a_study(
    place: Path, proxy: tuple[str, subprocess.Popen[str]]
) -> None:
    storage, _ = proxy
    begun(storage, "proxied", 6)
    crew = [worker(storage, "proxied") for _ in range(2)]
    for member in crew:
        text, _ = member.communicate(timeout=300)
        assert member.returncode == 0, text
    study = join("sqlite:///proxied.db", "proxied")  # the proxy's own storage holds it all
    now = standing(study)
    assert (now.finished, now.running, now.waiting) == (6, 0, 0)
    ended = [root(t) for t in trials_of(study) if t.state.name in ("COMPLETE", "PRUNED")]
    assert len(ended) == len(set(ended)) == 6 - now.failed
    assert cli.main(["tune", "--collect", "--storage", storage, "--study", "proxied", "--out",
                     "collected", "--device", "cpu", "-q"]) == 0
    assert Spec.load("collected").hash


def test_a_proxy_that_dies_is_one_line(
    place: Path, proxy: tuple[str, subprocess.Popen[str]]
) -> None:
    storage, served = proxy
    begun(storage, "dying", 50)
    member = worker(storage, "dying")
    until = time.monotonic() + 120
    while standing(join(storage, "dying")).fresh < 3 and time.monotonic() < until:
        time.sleep(0.2)
    served.send_signal(signal.SIGKILL)
    text, _ = member.communicate(timeout=120)
    assert member.returncode == 2, text
    said = [line for line in text.splitlines() if line.strip()]
    assert len(said) == 1 and said[0].startswith("error: a study's storage must answer"), text
    # gRPC has several words for it: unavailable, failed to connect, stream removed (socket closed)
    assert re.search(r"but it stopped: \w.+; trials that were under way", text), text


def test_a_taken_port_is_one_line(place: Path, proxy: tuple[str, subprocess.Popen[str]]) -> None:
    storage, _ = proxy
    second = spawn(["tune", "--serve", storage.removeprefix("grpc://"), "--storage",
                    "sqlite:///proxied.db"])
    text, _ = second.communicate(timeout=60)
    assert second.returncode == 2, text
    assert text.strip().splitlines()[-1].startswith("error: --serve needs a free port"), text


def test_what_a_database_says_at_last_is_one_line() -> None:
    full = sqlalchemy.exc.OperationalError(
        "INSERT INTO trials", {"secret": 1}, Exception("database or disk is full"))
    outer = optuna.exceptions.StorageInternalError("An exception is raised during the commit.")
    outer.__cause__ = full
    stumbled = UnboundLocalError("cannot access local variable 'updated_state'")
    stumbled.__context__ = outer
    for error in (full, outer, stumbled):
        line = explain(error, ["tune", "--trials", "5"])
        assert line is not None and "database or disk is full" in line and "\n" not in line
        assert line.endswith("to continue: searchpet tune --trials 5 --resume")
        assert "INSERT" not in line and "secret" not in line
    assert explain(UnboundLocalError("ours"), ["tune"]) is None  # a bug stays one

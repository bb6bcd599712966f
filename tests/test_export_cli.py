"""`searchpet export` as people meet it: runs of every sort, folders, errors, and the snippets."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from searchpet import cli
from searchpet.export import FORMATS
from searchpet.finished import predict
from searchpet.spec import Spec
from tests.commands import ROOT, workplace, write_task

JOB = ["search", "--budget", "2%", "--steps", "4", "--batch-size", "8", "--max-length", "16",
       "--tau", "0.5", "--controls", "0", "--quiet", "--model", "tiny"]
RUNS = {
    "whole": ["--task", "films"],
    "both": ["--task", "films,plays", "--count-head"],
    "flops": ["--task", "films", "--strategy", "prune_first", "--set",
              "prune_first.score=magnitude", "--keep-flops", "60%"],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("export")
    with workplace(folder, tiny_folder):
        write_task(folder / "plays")
        (folder / tiny_folder.name).symlink_to(tiny_folder)  # as the snippets call it
        for name, words in RUNS.items():
            assert cli.main([*JOB, *words, "--out", name]) == 0
        yield folder


@pytest.fixture
def say(home: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run `searchpet export` in `home`: exit code, stdout, stderr."""
    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        return (cli.main(["export", *words]), *capsys.readouterr())
    return run


def wrong(said: tuple[int, str, str], *parts: str) -> None:
    """Exit code 2 and one line that says all this."""
    code, out, err = said
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    for part in parts:
        assert part in err


def snippet(folder: Path) -> str:
    (found,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return str(found)


@pytest.mark.parametrize("form", FORMATS)
def test_an_export_is_checked_and_its_snippet_labels_texts(form: str, home: Path, say: Any,
                                                           ) -> None:
    code, out, err = say("whole", "--format", form, "--out", f"as {form}")
    assert (code, err) == (0, "") and "largest difference of logits" in out
    folder, spec = home / f"as {form}", Spec.load("whole")
    card = (folder / "README.md").read_text()
    assert all(word in card for word in ("tiny", "films", "neg, pos", "accuracy", spec.hash))
    for file in folder.rglob("*"):
        assert file.is_dir() or str(home) not in file.read_text(errors="ignore"), file
        assert file.stat().st_mode & 0o044 == 0o044
    code = ("import sys, types\n"  # nothing of ours is needed
            "class Never:\n    def find_spec(self, name, *_):\n"
            "        assert name.partition('.')[0] != 'searchpet'\n"
            "sys.meta_path.insert(0, Never())\n")
    found = subprocess.run(
        [sys.executable, "-c", code + snippet(folder)], cwd=home, capture_output=True, text=True,
        check=False, env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    assert found.returncode == 0, found.stderr
    (home / "two.csv").write_text("text\na text\nanother text\n")
    assert found.stdout.strip() == str([row["prediction"] for row in predict("whole", "two.csv")])


def test_an_export_of_one_of_several_tasks(home: Path, say: Any) -> None:
    wrong(say("both", "--out", "x"), "films, plays; give task, --task on the command line")
    wrong(say("both", "--out", "x", "--task", "tents"), "films, plays, but got 'tents'")
    code, out, _ = say("both", "--out", "plays_only", "--task", "./plays", "--json")
    values = json.loads(out)
    assert code == 0 and values["run"]["task"] == "plays"
    used, head = Spec.load("both").budget.used, values["figures"]["stored of the head"]
    assert values["figures"]["parameters of the structure"] + 2 * head == used  # --count-head


def test_what_was_pruned_is_refused_by_name(home: Path, say: Any) -> None:
    wrong(say("flops", "--out", "x"), "PEFT does not prune", " at bert.encoder.layer.",
          "searchpet.load")
    wrong(say("flops", "--out", "x", "--format", "merged"), "layers of one size", "--format onnx")
    assert not [p for p in home.iterdir() if p.name == "x" or "partial" in p.name]


def test_only_an_export_of_the_same_run_is_replaced(home: Path, say: Any) -> None:
    once = ["whole", "--out", "place", "--quiet"][:3]
    assert say(*once)[0] == 0
    (home / "place/README.md").write_text("changed")
    assert say(*once)[0] == 0 and "changed" not in (home / "place/README.md").read_text()
    other = ["both", "--task", "films", "--out", "place"]
    wrong(say(*other), "place is that of another; add --overwrite")
    assert say(*other, "--overwrite")[0] == 0
    assert json.loads((home / "place/export.json").read_text())["run"]["spec_hash"] == (
        Spec.load("both").hash)
    (home / "place/notes.txt").write_text("mine")
    wrong(say(*other, "--overwrite"), "place holds other files")
    wrong(say("whole", "--out", "films", "--overwrite"), "films holds other files")
    wrong(say("whole", "--out", "films/train.jsonl"), "is a file or a link")
    assert (home / "place/notes.txt").read_text() == "mine"


def test_wrong_words(home: Path, say: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong(say("whole"), "Missing option '--out'")
    wrong(say("whole", "--out", "x", "--format", "onx"), "did you mean 'onnx'?")
    wrong(say("nowhere", "--out", "x"), "nowhere is neither")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *_: None if name == "onnxruntime" else found(name))
    wrong(say("whole", "--out", "x", "--format", "onnx"),
          "--format onnx needs onnxruntime, which this Python has not; "
          "pip install 'searchpet[export]'")
    assert not (home / "x").exists()


def test_a_mismatch_deletes_the_export(home: Path, say: Any, monkeypatch: pytest.MonkeyPatch,
                                       ) -> None:
    module: Any = sys.modules["searchpet.export"]
    adapters, count = [], module.effective

    def one_more(adapter: Any, *given: Any) -> int:
        adapters.append(adapter)
        return int(count(adapter, *given)) + 1

    monkeypatch.setattr(module, "effective", one_more)
    said = say("whole", "--out", "x")
    wrong(said, "of the structure that are not 0, but ", "found in it; it was deleted")
    there, found = (int(n.replace(",", "")) for n in re.findall("the ([0-9,]+) n|but ([0-9,]+) w",
                                                                said[2]) for n in n if n)
    assert 0 < there <= Spec.load("whole").budget.used
    assert found == there + len(adapters)  # one too many of each
    assert not [p for p in home.iterdir() if p.name == "x" or "partial" in p.name]


KILLED = """
import os, signal, sys
import searchpet.export
from searchpet import cli
sys.modules["searchpet.export"].card = lambda *_: os.kill(os.getpid(), signal.{signal})
sys.exit(cli.main(["export", "whole", "--out", "killed"]))
"""


def test_a_killed_export_leaves_no_half_folder(home: Path, say: Any) -> None:
    for signal, left in (("SIGKILL", True), ("SIGINT", False)):
        subprocess.run([sys.executable, "-c", KILLED.format(signal=signal)], cwd=home, check=False,
                       capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert not (home / "killed").exists()
        assert (home / ".killed.partial").exists() == left
    (home / ".killed.partial").mkdir()
    assert say("whole", "--out", "killed")[0] == 0
    assert not (home / ".killed.partial").exists()
    shutil.rmtree(home / "killed")

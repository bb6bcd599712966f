"""Several budgets: one search, structures each part of the next, trained, and a curve."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from searchpet import cli, plot, report
from searchpet.engine import Result
from searchpet.plot import results
from searchpet.run import RunFolder
from searchpet.spec import Spec
from tests.commands import cut_off, workplace

BUDGETS = "0.1%, 60, 1%"  # of 25,408: 25, 60, 254
JOB = ["search", "--model", "tiny", "--task", "films", "--steps", "6", "--batch-size", "8",
       "--max-length", "16", "--controls", "0", "--budget", BUDGETS]
write = report.write  # the tests' own runs leave no page


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Path]:
    """A folder with a run on three budgets, `run`."""
    folder = tmp_path_factory.mktemp("curve")
    with workplace(folder, tiny_folder):
        assert cli.main([*JOB, "--out", "run", "--quiet"]) == 0
        yield folder


def specs(run: Path) -> list[Spec]:
    return [Spec.load(run / "budgets/25"), Spec.load(run / "budgets/60"), Spec.load(run)]


def coordinates(spec: Spec) -> set[tuple[str, int]]:
    return {(entry.key, c) for entry in spec.entries for c in entry.kept}


def test_a_smaller_structure_is_part_of_every_larger_one(place: Path) -> None:
    found = specs(place / "run")
    assert [spec.budget.limit for spec in found] == [25, 60, 254]
    assert [spec.budget.slack for spec in found] == [0, 0, 0]
    for small, large in pairwise(map(coordinates, found)):
        assert small < large
    assert all(spec.provenance["budgets"] == ["0.1%", "60", "1%"] for spec in found)


def test_every_structure_is_a_run(place: Path) -> None:
    run = place / "run"
    values = json.loads((run / "result.json").read_text())
    assert [(row["run"], row["trainable"]) for row in values["budgets"]] == [
        ("budgets/25", 25), ("budgets/60", 60), (".", 254)]
    for row in values["budgets"]:
        own = RunFolder(run / row["run"]).result()
        assert (own["score"], own["trainable"]) == (row["score"], row["trainable"])
        assert cli.main(["verify", str(run / row["run"])]) == 0
    assert not list(run.rglob("*checkpoint*"))
    scored = results(values, run)
    assert sorted(one.parameters for one in scored) == [25, 60, 254]
    assert len(plot.draw([run], "budget").axes) == 1


def test_the_smaller_runs_have_pages_too(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "write", write)
    run = shutil.copytree(place / "run", tmp_path / "run")
    spec, values = Spec.load(run), RunFolder(run).result()
    report.reported(lambda: Result(run, spec, values))()
    pages = sorted(str(page.relative_to(run)) for page in run.rglob("report.html"))
    assert pages == ["budgets/25/report.html", "budgets/60/report.html", "report.html"]


def test_the_page_shows_the_curve(place: Path, tmp_path: Path) -> None:
    run = shutil.copytree(place / "run", tmp_path / "run")
    page = write(run).read_text()
    assert 'id="budget"' in page and "Score over budget" in page
    assert (run / "budget.svg").read_bytes().startswith(b"<?xml")


def test_the_end_is_a_table(place: Path, capsys: Any) -> None:
    assert cli.main([*JOB, "--out", "run", "--resume", "--quiet"]) == 0
    said = capsys.readouterr().out
    for word in ("one search, 3 structures", "budgets/25", "0.1%", "254", "accuracy"):
        assert word in said


@pytest.mark.parametrize("signal", ["SIGKILL search 3", "SIGKILL train 9"])
def test_a_killed_run_goes_on_to_the_same(place: Path, signal: str) -> None:
    out = signal.replace(" ", "-")
    assert cut_off([*JOB, "--out", out, "--quiet"], signal, place).returncode == -9
    assert not (place / out / "result.json").exists()
    assert cli.main([*JOB, "--out", out, "--resume", "--quiet"]) == 0
    assert [s.hash for s in specs(place / out)] == [s.hash for s in specs(place / "run")]
    old, new = (json.loads((place / name / "result.json").read_text()) for name in ("run", out))
    assert new["budgets"] == old["budgets"] and new["knee"] == old["knee"]


def test_structures_alone(place: Path, capsys: Any) -> None:
    assert cli.main([*JOB, "--out", "alone", "--no-train", "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "budgets/60" in said and "next: searchpet show alone" in said
    assert specs(place / "alone") == specs(place / "run")
    assert not list((place / "alone").rglob("delta.safetensors"))
    assert cli.main([*JOB, "--out", "alone", "--resume", "--no-train", "--json", "--quiet"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [row["score"] for row in values["budgets"]] == [None] * 3


def test_pruned_structures_share_what_is_pruned(place: Path) -> None:
    assert cli.main([*JOB, "--out", "pruned", "--keep-flops", "70%", "--no-train", "--quiet"]) == 0
    found = specs(place / "pruned")
    assert found[0].plan == found[1].plan == found[2].plan != ()
    for small, large in pairwise(found):
        masks = {ratio.kind for ratio in small.plan}
        own, more = ({(e.key, c) for e in spec.entries if e.kind not in masks for c in e.kept}
                     for spec in (small, large))
        assert own < more


@pytest.mark.parametrize(("words", "message"), [
    (["--budget", "0.1%,25"], "budgets must differ, but 0.1% and 25 are both 25 parameters"),
    (["--budget", "1%,0.001%"], "budget must buy at least one unit"),
    (["--budget", "1%,,2%"], "budget must be a share"),
    (["--budget", "2,271"], "without separators, such as 2271"),
    (["--inherit"], "--inherit must have one budget"),
    (["--no-train", "--full"], "--no-train leaves nothing to --full"),
    (["--strategy", "random"], "several budgets must be filled from scores"),
    (["--strategy", "sparse_adapter"], "but strategy sparse_adapter keeps groups, masks"),
    (["--keep-weights", "50%", "--masks", "prune/weights", "--strategy", "prune_first"],
     "masks of single weights take one --budget at a time")])
def test_budgets_that_cannot_be_had_are_one_line(place: Path, capsys: Any, words: list[str],
                                                 message: str) -> None:
    assert cli.main([*JOB, *words, "--out", "not", "--quiet"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1

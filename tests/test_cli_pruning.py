"""`search --keep-flops` from the command line: search, train, show, load, resume."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer

import searchpet
from searchpet import catalog, cli, views
from searchpet.flops import flops
from searchpet.options import SETTINGS
from searchpet.settings import Settings
from tests.commands import cut_off, workplace

JOB = ["--model", "tiny", "--task", "films", "--budget", "2%", "--keep-flops", "60%", "--steps",
       "10", "--batch-size", "8", "--max-length", "16", "--tau", "0.5"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Path]:
    """A folder with a task, a backbone, and a finished run `done`."""
    folder = tmp_path_factory.mktemp("pruning")
    with workplace(folder, tiny_folder) as patch:
        words = ["search", *JOB, "--test", "--out", "done", "--quiet"]
        patch.setattr("sys.argv", ["searchpet", *words])
        assert cli.main(words) == 0
        yield folder


def result(run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(run, "result.json").read_text())
    return found


def test_the_result_says_what_is_left(home: Path) -> None:
    found = result("done")
    assert found["removed"] and found["keep"]["measure"] == "flops"
    assert found["keep"]["used"] <= found["keep"]["limit"] <= 0.6 * found["keep"]["dense"]
    assert [c["name"] for c in found["controls"]] == ["random", "random:unit"]
    assert found["trainable"] <= found["budget_limit"]


def test_the_loaded_model_is_smaller_and_scores_the_same(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = searchpet.load("done")
    masked = searchpet.load("done", remove=False)
    assert sum(p.numel() for p in model.parameters()) < sum(
        p.numel() for p in masked.parameters())
    model.searchpet.detach()
    del model.searchpet
    assert sum(flops(model, length=64).values()) <= result("done")["keep"]["limit"]
    assert cli.main(["evaluate", "done", "--split", "test", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(
        result("done")["score"], abs=1e-9)


def test_show_says_what_stays(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", "done"]) == 0
    said = capsys.readouterr().out
    assert "of the blocks' flops" in said and "percent kept, layer by layer" in said
    assert "neurons" in said


def test_a_latency_is_shown_in_milliseconds() -> None:
    keep = {"measure": "latency", "used": 12_829_542, "dense": 21_501_872, "text": "60%"}
    assert views.kept(keep) == "keeps 59.7% of the blocks' latency (12.8 of 21.5 ms, at most 60%)"


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_verify_counts_again(
    home: Path, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", "done", *more]) == 0
    said = capsys.readouterr().out
    assert "flops that are left" in said and "WRONG" not in said


def test_verify_finds_a_false_claim(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("done", "false")
    spec = json.loads(Path("false/spec.json").read_text())
    spec["keep"]["used"] -= 1000
    Path("false/spec.json").write_text(json.dumps(spec))
    assert cli.main(["verify", "false"]) == 2
    said = capsys.readouterr()
    assert "WRONG" in said.out
    assert said.err.strip().endswith(
        "but false is not: keep of result.json, flops that are left")


@pytest.mark.slow
def test_a_cut_off_search_with_pruning_continues_to_the_same_end(home: Path) -> None:
    words = ["search", *JOB, "--controls", "0", "--test", "--quiet"]
    killed = cut_off([*words, "--out", "cut"], "SIGKILL search 6", home)
    assert killed.returncode == -9, killed.stderr
    killed = cut_off([*words, "--out", "cut", "--resume"], "SIGKILL train 4", home)
    assert killed.returncode == -9, killed.stderr
    again = [*words, "--out", "cut", "--resume"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["searchpet", *again])
        assert cli.main(again) == 0
    for name in ("spec.json", "delta.safetensors"):
        whole = Path("done", name).read_bytes()
        if name == "spec.json":  # the command is part of it
            cut, done = (json.loads(Path(r, name).read_text()) for r in ("cut", "done"))
            assert cut["hash"] == done["hash"] and cut["entries"] == done["entries"]
        else:
            assert Path("cut", name).read_bytes() == whole
    assert result("cut")["score"] == result("done")["score"]


@pytest.mark.parametrize(("words", "message"), [
    (["--keep-flops", "1%"], "must leave what the masks of prune/structured cannot remove"),
    (["--keep-flops", "sixty"], "must be a share in (0%, 100%)"),
    (["--masks", "prune/layers"], "--masks needs a limit"),
    (["--keep-flops", "60%", "--masks", "prune/layer"], "space must be one of"),
    (["--keep-flops", "60%", "--strategy", "s3pet"], "s3pet searches PET alone"),
    (["--strategy", "prune_first"], "prune_first prunes, but no limit"),
    (["--keep-flops", "60%", "--strategy", "prune_first", "--set", "prune_first.score=size"],
     "score of prune units"),
    (["--space", "prune/layers"], "masks alone"),
])
def test_wrong_input_is_one_line(
    home: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = [w for w in JOB if w not in ("--keep-flops", "60%")]
    assert cli.main(["search", *base, "--out", "wrong", "--quiet", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.mark.parametrize("strategy", [
    name for name in catalog.names("strategies")
    if {"PRUNES", "PET_ALONE"} & set(dir(import_module(f"searchpet.strategies.{name}")))])
def test_a_strategy_that_does_not_suit_the_limit_is_refused_before_anything_is_loaded(
    strategy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    limit = [] if catalog.about("strategies", strategy, "PRUNES", False) else [
        "--keep-flops", "60%"]
    words = ["search", "--model", "nowhere", "--task", "nothing", "--strategy", strategy, *limit]
    assert cli.main(words) == 2
    law = "searches PET alone" if limit else "prunes, but no limit on inference"
    assert f"error: {strategy} {law}" in capsys.readouterr().err


@pytest.mark.parametrize("words", [
    ["--strategy", "prune_first", "--set", "prune_first.score=magnitude"],
    ["--strategy", "prune_first", "--set", "prune_first.score=contribution", "--masks",
     "prune/layers", "--keep-flops", "75%"],
    ["--strategy", "pet_first"],
    ["--strategy", "layer_drop:top", "--keep-flops", "75%"],
    ["--keep-weights", "50%"],
])
def test_other_strategies_obey_both_budgets(
    home: Path, words: list[str], tmp_path: Path
) -> None:
    base = [w for w in JOB if w not in ("--keep-flops", "60%")]
    keep = [] if "--keep-flops" in words or "--keep-weights" in words else ["--keep-flops", "60%"]
    out = str(tmp_path / "run")
    assert cli.main(["search", *base, *keep, *words, "--controls", "0", "--out", out, "-q"]) == 0
    found = result(out)
    assert 0.3 < found["keep"]["used"] / found["keep"]["dense"] <= 0.75
    assert found["keep"]["used"] <= found["keep"]["limit"] and found["removed"]


def test_a_teacher_changes_the_training_and_survives_a_kill(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "done", "--steps", "10", "--batch-size", "8", "--max-length", "16",
             "--tau", "0.5", "--distill", "full", "--quiet"]
    assert cli.main([*words, "--out", "taught"]) == 0
    killed = cut_off([*words, "--out", "taught2"], "SIGKILL train 5", home)
    assert killed.returncode == -9, killed.stderr
    assert Path("taught2/teacher.safetensors").is_file()
    assert cli.main([*words, "--out", "taught2", "--resume"]) == 0
    first, second, plain = (Path(run, "delta.safetensors").read_bytes()
                            for run in ("taught", "taught2", "done"))
    assert first == second != plain
    assert cli.main([*words[:-3], "--distill", "done", "--out", "taught3", "--quiet"]) == 0
    assert cli.main([*words[:-3], "--distill", "nowhere", "--out", "taught4", "--quiet"]) == 2
    assert "--distill must be `full` or the folder of a run" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["search", "train"])
def test_an_option_that_is_not_given_is_what_python_takes(command: str) -> None:
    """So that commands may leave it out, and `train` may take what the spec was made with."""
    own = {field.name: field.default for field in dataclasses.fields(Settings)}
    found = {p.name: p.default for p in typer.main.get_command(cli.app).commands[command].params}
    assert set(SETTINGS) == own.keys() <= found.keys()
    given = {name: found[name] for name in own if found[name] is not None}
    assert len(given) >= 8 and given == {name: own[name] for name in given}

"""`verify`: honest runs of every sort hold, one edit of any figure is found; `show` of masks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import searchpet
from searchpet import cli
from searchpet.errors import InputError
from searchpet.latency import Table
from searchpet.run import RunFolder
from searchpet.spec import Spec
from searchpet.verify import verify
from tests.commands import workplace

JOB = ["search", "--task", "films", "--budget", "2%", "--steps", "4", "--batch-size", "8",
       "--max-length", "16", "--tau", "0.5", "--controls", "0", "--quiet"]
FIRST = ["--strategy", "prune_first", "--set", "prune_first.score=magnitude"]
RUNS = {
    "whole": [],
    "headed": ["--count-head"],
    "flops": [*FIRST, "--keep-flops", "60%"],
    "ranks": ["--strategy", "rank_prune", "--keep-weights", "70%"],
    "times": [*FIRST, "--keep-latency", "60%"],
    "strange": [*FIRST, "--keep-flops", "60%"],
    "free": [*FIRST, "--keep-weights", "30%", "--masks", "prune/weights"],
    "two_four": [*FIRST, "--keep-weights", "50%", "--masks", "prune/two_four"],
    "sparse": ["--strategy", "sparse_adapter", "--space", "adapters", "--budget", "700"],
}


def strange(tiny_folder: Path, folder: Path) -> None:
    """A BERT under the name of a family of which nothing can be removed for good."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    config = transformers.BertConfig.from_pretrained(tiny_folder).to_dict()
    config.pop("model_type")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.ErnieModel(transformers.ErnieConfig(**config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Path]:
    """A folder with a finished run of every sort, as RUNS names them."""
    folder = tmp_path_factory.mktemp("verify")
    strange(tiny_folder, folder / "strange_model")
    table = Table(attention=4e4, ffn=3e4, head_feature=1000.25, neuron=500.5)
    with workplace(folder, tiny_folder) as patch:
        patch.setattr("searchpet.engine.measure", lambda *_: table)  # noise would drown 2 layers
        for name, words in RUNS.items():
            model = "strange_model" if name == "strange" else "tiny"
            assert cli.main([*JOB, *words, "--model", model, "--out", name]) == 0
        yield folder


def wrong(run: str | Path) -> list[str]:
    """What does not hold."""
    return [check.what for check in verify(run) if not check.holds]


def edited(run: str, folder: Path, file: str, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a run of which one JSON file was edited."""
    shutil.copytree(run, folder / run)
    path = folder / run / file
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return folder / run


# --- honest runs ---


@pytest.mark.parametrize("run", RUNS)
def test_an_honest_run_holds(
    home: Path, run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", run]) == 0
    said = capsys.readouterr()
    assert "WRONG" not in said.out and said.err == ""
    assert json.loads(Path(run, "result.json").read_text())["removed"] is (
        run in ("flops", "ranks", "times"))


def test_a_trained_structure_and_a_control_hold(home: Path, tmp_path: Path) -> None:
    words = ["train", "times", "--steps", "2", "--batch-size", "8", "--quiet"]
    assert cli.main([*words, "--out", str(tmp_path / "again")]) == 0
    assert wrong(tmp_path / "again") == []  # without the table of times
    (tmp_path / "again/result.json").unlink()
    assert wrong(tmp_path / "again") == []  # as controls, whose figures stand in their run's
    (tmp_path / "again/training.json").unlink()
    assert wrong(tmp_path / "again") == ["tensors of training.json"]


def test_a_masked_run_is_counted_and_says_that_nothing_was_removed(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {check.what: check for check in verify("strange")}
    keep = Spec.load("strange").keep
    assert keep is not None
    assert found["really removed"].claimed is found["really removed"].found is False
    assert found["flops that are left"].found == round(keep.used)
    assert found["flops of the whole blocks"].found == round(keep.dense)
    assert not any("masked and removed outputs" in what for what in found)
    assert cli.main(["verify", "strange"]) == 0
    (line,) = [row for row in capsys.readouterr().out.splitlines() if "really removed" in row]
    assert line.split() == ["ok", "really", "removed", "no", "no"]


def test_numbers_changed_after_the_training_are_found(home: Path, tmp_path: Path) -> None:
    shutil.copytree("flops", tmp_path / "flops")
    tensors, said = RunFolder(tmp_path / "flops").read_tensors("delta.safetensors")
    name = max(tensors, key=lambda key: tensors[key].numel())
    tensors[name].view(-1)[0] += 1e-3
    RunFolder(tmp_path / "flops").write_tensors("delta.safetensors", tensors, said)
    assert wrong(tmp_path / "flops") == ["tensors of result.json"]
    (tmp_path / "flops/result.json").unlink()
    assert wrong(tmp_path / "flops") == ["tensors of training.json"]


def test_masks_of_n_of_m_are_told_apart(home: Path) -> None:
    found = {check.what: check for check in verify("two_four")}
    masks = [e for e in Spec.load("two_four").entries if e.kind == "n_m"]
    assert found["masks that keep n of every m"].found == len(masks) > 0
    assert "masks that keep n of every m" not in {check.what for check in verify("free")}


def test_the_spec_in_the_folder_stands_for_the_folder(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", "flops/spec.json"]) == 0
    by_file = capsys.readouterr().out
    assert cli.main(["verify", "flops"]) == 0
    assert by_file == capsys.readouterr().out
    shutil.copy("flops/spec.json", "alone.json")
    assert cli.main(["verify", "alone.json"]) == 2
    said = capsys.readouterr().err
    assert "give the folder" in said and said.count("\n") == 1


# --- one edit ---


def put(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """An edit that sets one value."""
    def edit(content: dict[str, Any]) -> None:
        for name in path[:-1]:
            content = content[name]
        content[path[-1]] = value(content.get(path[-1])) if callable(value) else value
    return edit


def drop(name: str) -> Callable[[dict[str, Any]], None]:
    """An edit that deletes one value."""
    def edit(content: dict[str, Any]) -> None:
        del content[name]
    return edit


def wider(content: dict[str, Any]) -> None:
    """A larger budget, with the slack that goes with it."""
    content["budget"]["limit"] += 50
    content["budget"]["slack"] += 50


def cheaper(content: dict[str, Any]) -> None:
    """One parameter less, with the slack that goes with it."""
    content["budget"]["used"] -= 1
    content["budget"]["slack"] += 1


def zeroed(content: dict[str, Any]) -> None:
    content["plan"] = [{**ratio, "kept": 0.0} for ratio in content["plan"]]


def moved(content: dict[str, Any]) -> None:
    """One share goes to the other end of the model."""
    ratio = next(r for r in content["plan"] if r["kept"] < 1)
    ratio["depth"] = 1 - ratio["depth"]


@pytest.mark.parametrize(("run", "edit", "what"), [
    ("whole", put("budget", "text", value="3%"), "parameters that a budget of 3% is"),
    ("whole", put("budget", "text", value="much"), "parameters that a budget of much is"),
    ("whole", wider, "parameters that a budget of 2% is"),
    ("headed", wider, "parameters that a budget of 2% is"),
    ("whole", put("budget", "denominator", value=lambda n: n + 1),
     "parameters of which the budget is a share"),
    ("headed", cheaper, "parameters that count"),
    ("flops", put("keep", "text", value="70%"), "flops that 70% is"),
    ("flops", put("keep", "text", value="all"), "flops that all is"),
    ("flops", put("keep", "limit", value=lambda n: n + 1), "flops that 60% is"),
    ("flops", put("keep", "dense", value=lambda n: n + 1), "flops of the whole blocks"),
    ("flops", put("keep", "used", value=lambda n: n - 1), "flops that are left"),
    ("flops", put("keep", "measure", value="weights"), "weights of the whole blocks"),
    ("flops", put("keep", "measure", value="latency"), "keep of result.json"),
    ("flops", put("keep", "measure", value="hope"), "hope that 60% is"),
    ("flops", drop("keep"), "a limit on what is kept"),
    ("flops", drop("plan"), "shares of the plan as in the entries"),
    ("flops", zeroed, "shares of the plan as in the entries"),
    ("flops", moved, "shares of the plan as in the entries"),
    ("ranks", zeroed, "shares of the plan as in the entries"),
    ("ranks", put("keep", "used", value=lambda n: n - 1), "weights that are left"),
    ("strange", put("keep", "used", value=lambda n: n - 1), "flops that are left"),
    ("strange", put("keep", "limit", value=lambda n: 2 * n), "flops that 60% is"),
    ("times", put("keep", "limit", value=lambda n: n + 1), "latency that 60% is"),
    ("times", put("keep", "used", value=lambda n: n - 1), "latency that are left"),
    ("times", put("keep", "dense", value=lambda n: n + 1), "latency of the whole blocks"),
    ("free", put("keep", "dense", value=lambda n: n + 1), "weights of the whole blocks"),
    ("free", put("keep", "limit", value=lambda n: 2 * n), "weights that 30% is"),
    ("free", put("keep", "text", value="60%"), "weights that 60% is"),
    ("free", put("keep", "measure", value="flops"), "measure of masks of weights"),
    ("free", put("keep", "used", value=lambda n: n - 1), "weights that are left"),
    ("free", put("plan", value=[{"part": "encoder", "role": "ffn.out", "kind": "neurons",
                                 "depth": 0.0, "kept": 0.5}]),
     "shares of the plan as in the entries"),
    ("free", drop("keep"), "a limit on what is kept"),
])
def test_an_edit_of_the_spec_is_found(
    home: Path, run: str, edit: Callable[[dict[str, Any]], None], what: str, tmp_path: Path
) -> None:
    false = edited(run, tmp_path, "spec.json", edit)
    assert what in wrong(false)
    assert cli.main(["verify", str(false)]) == 2


@pytest.mark.parametrize(("run", "name", "value"), [
    ("flops", "trainable", 1), ("flops", "budget_limit", 1), ("flops", "spec_hash", "0" * 64),
    ("flops", "head", 1), ("flops", "keep", None), ("flops", "backbone", 1),
    ("flops", "fraction", 0.5), ("flops", "score", 0.99), ("flops", "validation_score", 0.99),
    ("whole", "keep", {"used": 1}), ("whole", "trainable", "many"),
])
def test_an_edit_of_the_result_is_found(
    home: Path, run: str, name: str, value: Any, tmp_path: Path
) -> None:
    false = edited(run, tmp_path, "result.json", put(name, value=value))
    assert wrong(false) == [f"{name} of result.json"]


@pytest.mark.parametrize(("run", "claim"), [("flops", False), ("strange", True), ("free", True),
                                            ("whole", True)])
def test_a_false_word_on_removal_is_found(
    home: Path, run: str, claim: bool, tmp_path: Path
) -> None:
    false = edited(run, tmp_path, "result.json", put("removed", value=claim))
    assert wrong(false) == ["really removed"]


@pytest.mark.parametrize(("file", "text", "message"), [
    ("result.json", "{}", "result.json must be that of a run, but has no task"),
    ("result.json", "[1]", "result.json must be that of a run, but has no task"),
    ("result.json", "{", "must be JSON"),
    ("settings.json", "[1]", "settings.json must be an object of settings, but is a list"),
    ("latency.json", "{}", "latency.json: attention"),
])
def test_a_file_that_is_another_is_one_line(
    home: Path, file: str, text: str, message: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree("times", tmp_path / "run")
    (tmp_path / "run" / file).write_text(text)
    assert cli.main(["verify", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    if file == "settings.json":
        for words in (["evaluate"], ["train"]):
            assert cli.main([*words, str(tmp_path / "run")]) == 2
            said = capsys.readouterr().err
            assert message in said and said.count("\n") == 1


# --- what masks of weights are ---


def test_masks_of_weights_cannot_be_removed(home: Path) -> None:
    for run in ("free", "two_four"):
        with pytest.raises(InputError, match="use remove=False"):
            searchpet.load(run, remove=True)
        searchpet.load(run)  # by default they are masked
    searchpet.load("sparse", remove=True)  # sparse PET prunes nothing
    searchpet.load("flops", remove=True)


def test_show_says_how_much_masks_keep(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", "free"]) == 0
    said = capsys.readouterr().out
    assert "percent kept" not in said and " 0 " not in said.partition("mask")[2]
    members = [e for e in Spec.load("free").entries if e.role == "attention.key" and e.mask]
    left = sum(e.mask.count for e in members if e.mask)
    (line,) = [row for row in said.splitlines() if row.startswith("weights  attention.key")]
    assert line.split()[2:] == ["2", f"{left:,}", "0-1", f"{left:,}", "of", "2,048,",
                                f"{100 * left / 2048:.3g}%"]
    assert cli.main(["show", "sparse"]) == 0
    said = capsys.readouterr().out
    assert "mask keeps" in said
    kept = [int(row.split(" of ")[0].split()[-1].replace(",", ""))
            for row in said.splitlines() if " of " in row and row.endswith("%")]
    assert sum(kept) == 700
    assert cli.main(["show", "flops"]) == 0
    said = capsys.readouterr().out
    assert "mask keeps" not in said and "percent kept, layer by layer" in said

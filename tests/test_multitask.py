"""Several tasks, one structure: turns, heads, scores, files, and what must not be asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import searchpet
from searchpet import cli
from searchpet.apply import part_of, read_delta
from searchpet.engine import evaluate, predict
from searchpet.errors import InputError
from searchpet.multitask import MARK, Heads, MultiSession, Turns, open_session, turn_to
from searchpet.run import RunFolder
from searchpet.session import Session
from searchpet.settings import Settings
from searchpet.verify import verify
from tests.commands import cut_off, workplace, write_task


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three tasks: two classes, three classes, a number."""
    data = tmp_path_factory.mktemp("tasks")
    write_task(data / "mood")
    words = ["cat", "dog", "film"]
    for name, label in (("pets", lambda i: i % 3), ("length", lambda i: 0.5 + i % 4)):
        (data / name).mkdir()
        for split, first, rows in (("train", 0, 36), ("validation", 36, 18), ("test", 54, 18)):
            lines = [{"text": f"{words[i % 3]} {'very ' * (i % 4)}{i}", "label": label(i)}
                     for i in range(first, first + rows)]
            (data / name / f"{split}.jsonl").write_text(
                "".join(json.dumps(line) + "\n" for line in lines))
    return data


@pytest.fixture(scope="module")
def common(tiny_folder: Path, tasks: Path) -> dict[str, Any]:
    return {"model": str(tiny_folder), "task": "mood,pets,length", "data": str(tasks), "steps": 6,
            "batch_size": 8, "max_length": 16}


@pytest.fixture(scope="module")
def found(common: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("runs") / "found"
    return searchpet.search(**common, budget="200", out=out, controls=0, test=True)


def test_folders_of_one_name_are_refused(common: dict[str, Any], tasks: Path) -> None:
    (tasks / "inner").mkdir()
    write_task(tasks / "inner" / "mood")
    both = f"{tasks / 'mood'},{tasks / 'inner' / 'mood'}"
    with pytest.raises(InputError, match="names of their own.*rename a folder"):
        open_session(Settings(**{**common, "task": both, "data": None}))


# --- turns ---


def test_tasks_take_turns_in_proportion_to_their_weights() -> None:
    turns = Turns([list(range(100))] * 3, (0.5, 0.25, 0.25))
    order = [turns.turn(step) for step in range(40)]
    assert [sum(task == k for task, _ in order) for k in range(3)] == [20, 10, 10]
    for start in range(0, 40, 4):  # and in every stretch of four steps
        assert sorted(task for task, _ in order[start : start + 4]) == [0, 0, 1, 2]
    for k in range(3):  # each task's own batches come one after another
        own = [number for task, number in order if task == k]
        assert own == list(range(len(own)))


def test_whose_turn_it_is_does_not_hang_on_what_was_asked_before() -> None:
    forward, backward = (Turns([[0] * 50] * 2, (0.7, 0.3)) for _ in range(2))
    ahead = [forward.turn(step) for step in range(30)]
    assert [backward.turn(step) for step in reversed(range(30))] == ahead[::-1]


# --- session ---


def test_each_task_has_its_own_head_and_its_own_loss(common: dict[str, Any]) -> None:
    session = open_session(Settings(**common))
    assert isinstance(session, MultiSession)
    with session.fresh(0) as model:
        assert isinstance(model.classifier, Heads)
        assert {p.shape[0] for n, p in model.named_parameters() if n in session.head} == {1, 2, 3}
        assert session.head_size == sum(k * 33 for k in (2, 3, 1))
        batches, loss = session.batches(session.splits["train"], 0), session.loss(model)
        for step, outputs in ((0, 2), (1, 3), (2, 1)):
            assert int(batches[step][MARK]) == step
            for p in model.parameters():
                p.grad = None
            value = loss(batches[step])
            value.backward()
            reached = [p.shape[0] for p in model.classifier.parameters()
                       if p.grad is not None and p.grad.abs().sum() > 0]
            assert reached == [outputs, outputs]  # weight and bias of this task alone
            plain = {k: v for k, v in batches[step].items() if k != MARK}
            assert model(**plain).logits.shape == (8, outputs)


def test_the_heads_are_those_of_single_tasks(common: dict[str, Any]) -> None:
    several = open_session(Settings(**common))
    for k, name in enumerate(("mood", "pets", "length")):
        alone = open_session(Settings(**{**common, "task": name}))
        assert type(alone) is Session
        with several.fresh(0) as many, alone.fresh(0) as one:
            assert torch.equal(many.classifier.of[k].weight, one.classifier.weight)
            turn_to(many, k, several.tasks[k])
            batch = alone.batches(alone.splits["train"], 0)[0]
            assert torch.equal(many.eval()(**batch).loss, one.eval()(**batch).loss)


# --- tasks that are folders, by the command line ---


@pytest.fixture(scope="module")
def folders(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A current folder with two tasks in `data`, and a run on both, which are named as folders."""
    folder = tmp_path_factory.mktemp("folders")
    (folder / "data").mkdir()
    with workplace(folder, tiny_folder) as patch:
        write_task(folder / "data/a")
        write_task(folder / "data/b", rows=40)
        (folder / "data/b/meta.json").write_text('{"labels": ["bad", "good"]}')
        patch.setenv("HF_HUB_OFFLINE", "1")
        words = ["search", "--model", "tiny", "--task", "data/a, data/b", "--steps", "4",
                 "--batch-size", "8", "--max-length", "12", "--budget", "200", "--strategy",
                 "random:unit", "--controls", "0", "--quiet", "--out", "run"]
        assert cli.main(words) == 0
        yield folder


def figures(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, float]:
    assert cli.main([*words, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


@pytest.mark.parametrize("name", ["b", "data/b", "./data/b/"])
def test_a_task_that_is_a_folder_is_known_by_its_name_and_by_the_folder(
    folders: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = figures(["evaluate", "run"], capsys)
    stored = json.loads(Path("run/result.json").read_text())["metrics"]
    assert every == pytest.approx({k: v for k, v in stored.items() if k != "mean"}, abs=1e-6)
    own = {k.partition("/")[2]: v for k, v in every.items() if k.startswith("b/")}
    assert figures(["evaluate", "run", "--task", name], capsys) == own
    (tmp_path / "new.jsonl").write_text('{"text": "good cat"}\n')
    assert cli.main(["predict", "run", str(tmp_path / "new.jsonl"), "--task", name]) == 0
    assert json.loads(capsys.readouterr().out)["prediction"] in ("bad", "good")
    words = ["train", "run", "--task", name, "--steps", "2", "--quiet", "--out",
             str(tmp_path / "alone")]
    assert cli.main(words) == 0
    capsys.readouterr()
    alone = json.loads((tmp_path / "alone/settings.json").read_text())
    assert Path(alone["task"]) == Path("data/b") and alone["max_length"] == 12
    assert json.loads((tmp_path / "alone/result.json").read_text())["task"] == "b"


def test_tasks_of_a_run_are_trained_together_by_their_names(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "run", "--steps", "2", "--quiet", "--max-length", "10", "--out"]
    assert cli.main([*words, str(tmp_path / "named"), "--task", "b,a"]) == 0
    assert cli.main([*words, str(tmp_path / "same")]) == 0
    for run, task in (("named", "data/b,data/a"), ("same", "data/a, data/b")):
        asked = json.loads((tmp_path / run / "settings.json").read_text())
        assert (asked["task"], asked["max_length"]) == (task, 10)  # an option given wins


def test_a_task_that_the_run_has_not_learned_is_one_line(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", "run", "--task", "c"]) == 2
    said = capsys.readouterr().err
    assert "has learned, a, b, but got 'c'" in said and said.count("\n") == 1


# --- jobs ---


def test_the_score_is_the_weighted_mean_and_each_task_is_told(found: Any) -> None:
    values = json.loads((found.path / "result.json").read_text())
    metrics = values["metrics"]
    assert next(iter(metrics)) == "mean" and values["score"] == metrics["mean"]
    firsts = [metrics["mood/accuracy"], metrics["pets/accuracy"], metrics["length/spearman"]]
    assert metrics["mean"] == pytest.approx(sum(firsts) / 3)
    assert values["task"] == "mood,pets,length" and values["metric"] == "mean"
    assert values["split"] == "test" and values["trainable"] <= 200


def test_one_file_holds_every_head_and_each_task_loads_from_it(found: Any) -> None:
    tensors, about = read_delta(RunFolder(found.path))
    heads = [name for name in tensors if name.startswith("head/")]
    assert len(heads) == 6 and [part.task for part in about.parts] == ["mood", "pets", "length"]
    for k, (task, outputs) in enumerate((("mood", 2), ("pets", 3), ("length", 1))):
        model = searchpet.load(found.path, task=task)
        assert type(model.classifier) is nn.Linear and model.classifier.out_features == outputs
        own, part = part_of(tensors, about, task)
        assert torch.equal(model.classifier.weight, tensors[f"head/classifier.of.{k}.weight"])
        assert own.keys() == {n for n in tensors if not n.startswith("head/")} | {
            "head/classifier.weight", "head/classifier.bias"}
        assert part.task == task


def test_a_run_is_measured_on_each_task_or_on_the_one_named(found: Any, tmp_path: Path) -> None:
    every = evaluate(found.path, split="test")
    assert every == pytest.approx(
        {k: v for k, v in found.values["metrics"].items() if k != "mean"}, abs=1e-6)
    assert evaluate(found.path, split="test", task="pets") == {
        "accuracy": every["pets/accuracy"], **{
            k.partition("/")[2]: v for k, v in every.items()
            if k.startswith("pets/") and k != "pets/accuracy"}}
    (tmp_path / "new.jsonl").write_text('{"text": "good cat"}\n')
    (row,) = predict(found.path, tmp_path / "new.jsonl", task="mood")
    assert row["prediction"] in ("neg", "pos")


def test_a_run_on_several_tasks_must_be_told_which(found: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="mood, pets, length; give task"):
        searchpet.load(found.path)
    (tmp_path / "new.jsonl").write_text('{"text": "good cat"}\n')
    with pytest.raises(InputError, match="has learned, mood, pets, length, but got 'sst2'"):
        predict(found.path, tmp_path / "new.jsonl", task="sst2")


def test_what_is_claimed_is_found_again(found: Any) -> None:
    assert [check.what for check in verify(found.path) if not check.holds] == []


@pytest.mark.parametrize("more", [
    {"strategy": "prune_first", "keep_flops": "60%"},
    {"strategy": "bilevel", "keep_flops": "60%"},
    {"strategy": "prune_first", "keep_weights": "50%", "masks": "prune/weights"},
], ids=["prune_first", "joint", "elements"])
def test_one_structure_is_pruned_for_all_tasks(common: dict[str, Any], tmp_path: Path,
                                               more: dict[str, Any]) -> None:
    run = searchpet.search(**common, budget="300", out=tmp_path / "run", controls=0, **more)
    assert run.spec.keep.used <= run.spec.keep.limit
    assert [check.what for check in verify(run.path) if not check.holds] == []
    alone = searchpet.train(run.path, **{**common, "task": "pets"}, out=tmp_path / "alone")
    assert alone.values["trainable"] == run.values["trainable"]


def test_weights_steer_the_score(common: dict[str, Any], tmp_path: Path) -> None:
    run = searchpet.search(**{**common, "task": "mood,pets"}, task_weights="3,1", budget="100",
                           strategy="random:unit", out=tmp_path / "run", controls=0)
    m = run.values["metrics"]
    assert m["mean"] == pytest.approx(0.75 * m["mood/accuracy"] + 0.25 * m["pets/accuracy"])


@pytest.mark.slow
def test_a_killed_search_goes_on_to_the_same_bytes(tiny_folder: Path, tasks: Path,
                                                   tmp_path: Path) -> None:
    words = ["search", "--model", str(tiny_folder), "--task", "mood,pets", "--data", str(tasks),
             "--steps", "8", "--batch-size", "8", "--max-length", "16", "--budget", "200",
             "--controls", "0", "--quiet"]
    whole = cut_off([*words, "--out", "whole"], "SIGKILL none 1", tmp_path)
    assert whole.returncode == 0, whole.stderr
    for stage in ("search", "train"):
        killed = cut_off([*words, "--out", stage], f"SIGKILL {stage} 5", tmp_path)
        assert killed.returncode == -9
        again = cut_off([*words, "--out", stage, "--resume"], "SIGKILL none 1", tmp_path)
        assert again.returncode == 0, again.stderr
        for file in ("spec.json", "delta.safetensors"):
            assert (tmp_path / stage / file).read_bytes() == (
                tmp_path / "whole" / file).read_bytes(), (stage, file)


@pytest.mark.parametrize(("change", "law"), [
    ({"task": "mood,mood"}, "each task once"),
    ({"task": "mood,"}, "each task once"),
    ({"task": "mood,nothing"}, "nothing"),
    ({"task_weights": "1,2"}, "3 numbers > 0"),
    ({"task_weights": "1,0,2"}, "3 numbers > 0"),
    ({"task_weights": "a,b,c"}, "3 numbers > 0"),
    ({"task": "mood", "task_weights": "1"}, "needs several tasks"),
    ({"distill": "full"}, "take one task"),
])
def test_what_cannot_be_is_refused(common: dict[str, Any], tmp_path: Path, law: str,
                                   change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=law):
        searchpet.search(**{**common, **change}, budget="100", out=tmp_path / "run")

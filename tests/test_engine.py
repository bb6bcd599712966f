"""Whole jobs on a tiny model and a tiny folder task: what is written, counted, and read again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import searchpet
from searchpet import engine, once
from searchpet.errors import InputError
from searchpet.run import RunFolder
from searchpet.session import Session
from searchpet.settings import TAU
from searchpet.spec import Spec

KEYS = {"task", "metric", "split", "score", "budget_limit", "trainable", "head", "backbone",
        "fraction", "strategy", "seed", "seconds", "controls", "full_finetune"}
BUDGET = 200


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty texts: does a cat or a dog come first?"""
    folder = tmp_path_factory.mktemp("tasks") / "pets"
    folder.mkdir()
    words = ["good", "bad", "very", "film", "the", "a", "is", "was", "not", "it"]
    for split, first, rows in (("train", 0, 40), ("validation", 40, 16), ("test", 56, 16)):
        lines = [
            {"text": f"{('cat', 'dog')[i % 2]} {words[i % 10]} {words[i // 10]}", "label": i % 2}
            for i in range(first, first + rows)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def common(tiny_folder: Path, task: Path) -> dict[str, Any]:
    return {"model": str(tiny_folder), "task": str(task), "steps": 4, "batch_size": 8,
            "max_length": 16}


@pytest.fixture(scope="module")
def found(common: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> engine.Result:
    """A finished search with one draw of each control."""
    out = tmp_path_factory.mktemp("runs") / "found"
    return searchpet.search(**common, budget=str(BUDGET), out=out, test=True)


@pytest.fixture
def splits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The splits that trainings ask to evaluate on."""
    asked: list[str] = []
    original = Session.evaluate

    def evaluate(self: Session, model: Any, split: str) -> dict[str, float]:
        asked.append(split)
        return original(self, model, split)

    monkeypatch.setattr(Session, "evaluate", evaluate)
    return asked


# --- search ---


def test_the_result_holds_every_key_and_the_right_counts(found: engine.Result) -> None:
    values = json.loads((found.path / "result.json").read_text())
    assert values.keys() >= KEYS and values == found.values
    assert values["task"] == "pets" and values["metric"] == "accuracy"
    assert values["budget_limit"] == BUDGET == found.spec.budget.limit
    assert 0 < values["trainable"] == found.spec.budget.used <= BUDGET
    assert values["head"] == 2 * 32 + 2
    assert values["backbone"] == found.spec.backbone.parameters == found.spec.budget.denominator
    assert values["fraction"] == values["trainable"] / values["backbone"]
    assert set(values["seconds"]) == {"search", "train"}
    assert [row["name"] for row in values["controls"]] == ["random", "random:unit"]
    assert all(row["trainable"] <= BUDGET for row in values["controls"])
    assert values["split"] == "test" and values["full_finetune"] is None
    assert values["score"] == found.score


def test_the_spec_is_complete_and_names_no_path(found: engine.Result) -> None:
    spec = Spec.load(found.path)
    assert spec == found.spec and spec.backbone.name == "tiny-bert"
    assert spec.provenance.keys() >= {"strategy", "hyperparameters", "seed", "data", "versions",
                                      "command"}
    text = (found.path / "spec.json").read_text()
    assert str(found.path) not in text and "/tmp" not in text


def test_the_file_of_tensors_holds_deltas_and_head_alone(found: engine.Result) -> None:
    tensors, _ = RunFolder(found.path).read_tensors("delta.safetensors")
    head = {name: t for name, t in tensors.items() if name.startswith("head/")}
    assert set(head) == {"head/classifier.weight", "head/classifier.bias"}
    keys = {entry.key for entry in found.spec.entries}
    rest = {name: t for name, t in tensors.items() if name not in head}
    assert {name.rpartition("/")[0] for name in rest} == keys
    assert sum(t.numel() for t in rest.values()) == found.spec.budget.used
    assert all(t.is_floating_point() for t in tensors.values())  # no masks, no indices


def test_a_finished_run_holds_no_checkpoint_and_no_half_file(found: engine.Result) -> None:
    left = [f.name for f in found.path.rglob("*") if "checkpoint" in f.name or "partial" in f.name]
    assert left == []


def test_a_finished_run_is_returned(found: engine.Result, common: dict[str, Any]) -> None:
    before = {f: f.stat().st_mtime_ns for f in found.path.rglob("*.safetensors")}
    again = searchpet.search(
        **common, budget=str(BUDGET), out=found.path, test=True, resume=True)
    assert again.values == found.values and again.spec == found.spec
    assert {f: f.stat().st_mtime_ns for f in before} == before
    with pytest.raises(InputError, match="not empty"):
        searchpet.search(**common, budget=str(BUDGET), out=found.path, test=True)
    with pytest.raises(InputError, match="budget was '200'"):
        searchpet.search(**common, budget="300", out=found.path, test=True, resume=True)


def test_the_same_search_writes_the_same_bytes(
    found: engine.Result, common: dict[str, Any], tmp_path: Path
) -> None:
    again = searchpet.search(
        **common, budget=str(BUDGET), out=tmp_path / "again", controls=0, test=True)
    for name in ("spec.json", "delta.safetensors"):
        assert (again.path / name).read_bytes() == (found.path / name).read_bytes(), name
    assert again.score == found.score


def test_the_test_split_is_read_only_on_request(
    common: dict[str, Any], tmp_path: Path, splits: list[str]
) -> None:
    quiet = searchpet.search(**common, budget="50", strategy="random:unit", out=tmp_path / "a")
    assert "test" not in splits and quiet.values["split"] == "validation"
    searchpet.search(**common, budget="50", strategy="random:unit", out=tmp_path / "b",
                     controls=0, test=True)
    assert splits.count("test") == 1


def test_a_test_score_needs_labels(common: dict[str, Any], task: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for split in ("train", "validation"):
        (bare / f"{split}.jsonl").write_bytes((task / f"{split}.jsonl").read_bytes())
    with pytest.raises(InputError, match="--test needs a labelled test split"):
        searchpet.search(**common | {"task": str(bare)}, out=tmp_path / "run", test=True)


@pytest.mark.parametrize("strategy", ["uniform:lora_qv", "uniform:bias", "random", "s3pet"])
def test_every_strategy_searches_within_the_budget(
    strategy: str, common: dict[str, Any], tmp_path: Path
) -> None:
    result = searchpet.search(**common, budget="1%", strategy=strategy, controls=0,
                              out=tmp_path / "run")
    assert result.values["budget_limit"] == result.values["backbone"] // 100
    assert 0 < result.values["trainable"] <= result.values["budget_limit"]
    assert result.values["strategy"] == strategy
    assert result.values["space"] == (strategy.replace(":", "/") if ":" in strategy else "nano")


def test_a_budget_may_count_the_head(common: dict[str, Any], tmp_path: Path) -> None:
    head = 2 * 32 + 2
    with pytest.raises(InputError, match="must exceed its 66 parameters"):
        searchpet.search(**common, budget="66", count_head=True, out=tmp_path / "none")
    result = searchpet.search(**common, budget="80", count_head=True, strategy="random:unit",
                              controls=0, out=tmp_path / "run")
    use = result.spec.budget
    assert use.counts == "deltas and head" and use.used + use.slack == use.limit == 80
    assert result.values["trainable"] == use.used - head
    assert torch.is_tensor(searchpet.load(result.path).classifier.weight)


def test_a_budget_that_counts_the_head_is_of_the_tasks_own(
    common: dict[str, Any], tmp_path: Path
) -> None:
    found = searchpet.search(**common, budget="80", count_head=True, strategy="random:unit",
                             controls=0, out=tmp_path / "run")
    (three := tmp_path / "three").mkdir()
    for split in ("train", "validation"):
        (three / f"{split}.jsonl").write_text("".join(
            json.dumps({"text": f"a film {i} {split}", "label": i % 3}) + "\n" for i in range(12)))
    with pytest.raises(InputError, match=r"but this one is for 66 parameters and the head has 99; "
                                         "carry it over: searchpet transfer"):
        searchpet.train(found.path, **common | {"task": str(three)}, out=tmp_path / "no")
    with pytest.raises(InputError, match="must exceed its 99 parameters"):
        searchpet.transfer(found.path, **common | {"task": str(three)}, out=tmp_path / "less")
    moved = searchpet.transfer(found.path, **common | {"task": str(three)}, budget="110",
                               out=tmp_path / "more")
    use = Spec.load(moved.path).budget
    assert use.used + use.slack == use.limit == 110 and use.used > 99


def test_a_spec_is_at_home_on_the_weights_that_it_was_trained_on(
    common: dict[str, Any], found: engine.Result, tiny_folder: Path, tmp_path: Path
) -> None:
    model = transformers.AutoModel.from_pretrained(tiny_folder)
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    shutil.copytree(tiny_folder, other := tmp_path / "other")
    model.save_pretrained(other)
    result = searchpet.train(found.path, **common | {"model": str(other)}, out=tmp_path / "run")
    spec = Spec.load(result.path)
    assert spec.entries == found.spec.entries
    assert spec.backbone.revision != found.spec.backbone.revision
    assert spec.hash == result.values["spec_hash"] == result.spec.hash
    assert engine.evaluate(result.path)["accuracy"] == result.values["score"]
    again = searchpet.train(found.path, **common | {"model": str(other)}, out=tmp_path / "run",
                            resume=True)
    assert again.spec.hash == spec.hash


@pytest.mark.parametrize(("wrong", "message"), [
    ({"steps": 0}, "--steps must be >= 1"), ({"batch_size": 0}, "--batch-size must be >= 1"),
    ({"tau": 0.0}, "--tau must be"), ({"lr": float("nan")}, "--lr must be"),
    ({"seed": -1}, "--seed must be"), ({"precision": "fp8"}, "fp32"),
    ({"device": "tpu9"}, "--device must be"), ({"controls": -1}, "--controls must be"),
    ({"budget": "0"}, "cheapest costs 1 "), ({"budget": "0.0000001%"}, "cheapest costs 1 "),
    ({"budget": "101%"}, "share in"), ({"strategy": "bilevle"}, "did you mean 'bilevel'"),
    ({"strategy": "bilevel:x"}, "has no variants"), ({"strategy": "random:x"}, "variant"),
    ({"strategy": "uniform:nothing"}, "nothing"),
    ({"strategy": "uniform"}, "uniform"),
    ({"space": "nanno"}, "did you mean 'nano'"), ({"set": {"alpha": 1}}, "alpha_lr"),
    ({"set": {"alpha_lr": "fast"}}, "alpha_lr must be a float"),
])
def test_wrong_input_is_one_line_that_names_it(
    wrong: dict[str, Any], message: str, common: dict[str, Any], tmp_path: Path
) -> None:
    asked = {**common, "budget": "50", "controls": 0, "out": tmp_path / "run", **wrong}
    with pytest.raises(InputError, match=message) as caught:
        searchpet.search(**asked)
    assert "\n" not in str(caught.value)


# --- load, apply, merge, evaluate, predict ---


def test_what_is_loaded_scores_what_the_result_says(found: engine.Result) -> None:
    assert engine.evaluate(found.path, split="test") == pytest.approx(found.values["metrics"])
    validation = engine.evaluate(found.path, split="validation")
    assert validation["accuracy"] == found.values["validation_score"]
    with pytest.raises(InputError, match="--split must be a labelled split"):
        engine.evaluate(found.path, split="tset")


def test_a_loaded_model_is_the_transformers_class(found: engine.Result) -> None:
    model = searchpet.load(found.path)
    assert type(model).__name__ == "BertForSequenceClassification" and not model.training
    assert list(model.config.id2label.values()) == ["0", "1"]
    assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.shape == (1, 2)


def test_a_loaded_model_is_the_trained_one_to_the_bit(
    common: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = {"input_ids": torch.randint(5, 60, (4, 9), generator=torch.Generator().manual_seed(0))}
    trained: list[torch.Tensor] = []
    original = Session.trained

    def logits(self: Session, *args: Any) -> Any:
        model = self._backbone.model.eval()  # as it is when its tensors are saved
        with torch.no_grad():
            trained.append(model(**batch).logits)
        return original(self, *args)

    monkeypatch.setattr(Session, "trained", logits)
    result = searchpet.search(**common, budget=str(BUDGET), controls=0, out=tmp_path / "run")
    with torch.no_grad():
        assert torch.equal(searchpet.load(result.path)(**batch).logits, trained[-1])


def test_predictions_are_the_likeliest(found: engine.Result, task: Path, tmp_path: Path) -> None:
    rows = engine.predict(found.path, task / "test.jsonl")
    labels = [json.loads(line)["label"] for line in (task / "test.jsonl").read_text().splitlines()]
    right = [row["prediction"] == str(label) for row, label in zip(rows, labels, strict=True)]
    assert sum(right) / len(right) == pytest.approx(found.score)
    (tmp_path / "new.csv").write_text('text\n"cat, good"\ndog\n')
    new = engine.predict(found.path, tmp_path / "new.csv")
    assert [row["text"] for row in new] == ["cat, good", "dog"]
    assert {row["prediction"] for row in new} <= {"0", "1"}


def test_damaged_or_foreign_tensors_are_refused(found: engine.Result, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("spec.json", "settings.json", "delta.safetensors"):
        (run / name).write_bytes((found.path / name).read_bytes())
    searchpet.load(run)
    tensors, metadata = RunFolder(run).read_tensors("delta.safetensors")
    other = json.loads(metadata["searchpet"]) | {"spec_hash": "0" * 64}
    for content, message in (({"searchpet": json.dumps(other)}, "must belong to the spec"),
                             ({"searchpet": "{}"}, "Field required"), ({}, "delta.safetensors")):
        RunFolder(run).write_tensors("delta.safetensors", tensors, content)
        with pytest.raises(InputError, match=message) as caught:
            searchpet.load(run)
        assert "\n" not in str(caught.value)
    (run / "delta.safetensors").write_bytes(b"garbage")
    with pytest.raises(InputError, match="damaged"):
        searchpet.load(run)


# --- train ---


def test_a_spec_trains_as_after_a_search_from_the_start(
    found: engine.Result, common: Any, tmp_path: Path
) -> None:
    fresh = searchpet.search(**common, budget=str(BUDGET), out=tmp_path / "fresh", test=True,
                             controls=0, inherit=False)
    result = searchpet.train(found.path, **common, out=tmp_path / "run", test=True)
    assert result.values.keys() >= KEYS and result.score == fresh.score
    assert result.spec == found.spec == fresh.spec and result.values["controls"] == []
    same = (tmp_path / "run" / "delta.safetensors").read_bytes()
    assert same == (fresh.path / "delta.safetensors").read_bytes()
    assert same != (found.path / "delta.safetensors").read_bytes()  # began where it had ended


def test_a_sweep_takes_the_tau_with_the_best_validation_score(
    found: engine.Result, common: dict[str, Any], tmp_path: Path
) -> None:
    longer = {**common, "steps": 12}
    result = searchpet.train(found.spec, **longer, out=tmp_path / "run", sweep=True)
    swept = result.values["sweep"]
    assert [one["tau"] for one in swept["tried"]] == pytest.approx(
        [TAU / 3, TAU, 3 * TAU, 9 * TAU])
    last = [one for one in swept["tried"] if one["steps"] > 2]
    best = max(one["score"] for one in last)
    assert len(last) == 2 and swept["tau"] in [one["tau"] for one in last if one["score"] == best]
    assert result.values["tau"] == swept["tau"] and swept["trainings"] <= 11 / 6


@pytest.mark.parametrize(("start", "end", "warned"), [(0.8, 0.5, 1), (0.5, 0.8, 0), (0.5, 0.5, 0)])
def test_a_training_in_vain_says_so(
    start: float, end: float, warned: int, found: engine.Result, common: dict[str, Any],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([start, *[end] * 9])
    monkeypatch.setattr(Session, "evaluate", lambda *_: {"accuracy": next(scores)})
    result = searchpet.train(found.spec, **common, out=tmp_path / "run")
    assert result.score == end and len(result.values["warnings"]) == warned
    if warned:
        assert result.values["warnings"][0].startswith(
            "training ended at 0.5000 on validation, below the 0.8000 that it began with; try a ")


def test_after_a_sweep_none_is_advised() -> None:
    row = {"start_score": 0.8, "validation_score": 0.5}
    spec: Any = object()
    assert "train SPEC --sweep" in once._in_vain(spec, {**row, "sweep": None})[0]
    assert "--sweep" not in once._in_vain(spec, {**row, "sweep": {"taus": []}})[0]


@pytest.mark.parametrize("reference", ["full", "head"])
def test_references_train_everything_or_the_head_alone(
    reference: str, common: dict[str, Any], tmp_path: Path
) -> None:
    result = searchpet.train(reference=reference, **common, out=tmp_path / "run")
    values = result.values
    assert values.keys() >= KEYS and values["strategy"] == reference and result.spec is None
    assert values["trainable"] == (values["backbone"] if reference == "full" else 0)
    assert values["budget_limit"] is None and values["head"] == 66
    assert (values["full_finetune"] == values["score"]) is (reference == "full")


def test_train_takes_exactly_one_thing(found: engine.Result, common: Any, tmp_path: Path) -> None:
    for asked in ({}, {"spec": found.spec, "reference": "head"}):
        with pytest.raises(InputError, match="exactly one"):
            searchpet.train(**asked, **common, out=tmp_path / "run")

"""Many tasks on one backbone compute what each does alone; what does not fit is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import searchpet
from searchpet.apply import apply, load
from searchpet.cli import main
from searchpet.errors import InputError
from searchpet.run import RunFolder
from searchpet.serve import serve
from searchpet.spacefile import Rule
from searchpet.spec import Spec
from tests.commands import workplace, write_task
from tests.laws import families as tiny
from tests.test_saving import bare

FAMILIES = ["bert", "gpt2", "gpt_neox", "llama", "t5", "vit"]
LABELS = {"a": 3, "b": 2, "c": 5}
OTHERS = {"adapter": {"bottleneck": 3, "stage": "parallel"}, "lora": {"rank": 2}}


def with_labels(family: str, labels: int) -> nn.Module:
    """The same backbone with a head of its own."""
    base = bare(family)
    config = copy.deepcopy(base.config)
    config.num_labels = labels
    model = type(base)(config)
    head = tiny.head_of(base)
    model.load_state_dict({n: p for n, p in base.state_dict().items() if n not in head},
                          strict=False)
    tiny.perturb((p for n, p in model.named_parameters() if n in head), 0.3, seed=labels)
    return model.eval()


def saved(folder: Path, model: nn.Module, rules: list[Rule], seed: int, share: float = 0.4,
          ) -> Path:
    """A folder of an applied model that looks trained."""
    placed = tiny.space(model, *rules)
    apply(model, tiny.spec_of(model, placed, tiny.some(len(placed), seed, share)))
    tiny.perturb(model.searchpet.parameters(), 0.3, seed=seed)
    model.save_pretrained(folder)
    return folder


def tasks(family: str, folder: Path) -> dict[str, Path]:
    """Three tasks of different structures, kinds and numbers of labels; one prunes."""
    kinds = {"a": tiny.every_kind(), "b": tiny.every_kind(**OTHERS),
             "c": tiny.every_mask() if family in ("bert", "llama", "t5") else tiny.every_kind()}
    return {name: saved(folder / name, with_labels(family, LABELS[name]), kinds[name], seed,
                        0.8 if name == "c" else 0.4)
            for seed, name in enumerate(kinds)}


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def alone(folders: dict[str, Path], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tiny.logits(load(place, remove=False), batch)
            for name, place in folders.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_tasks_in_turn_and_mixed_compute_what_each_does_alone(family: str, tmp_path: Path) -> None:
    folders, batch = tasks(family, tmp_path), tiny.inputs(family, rows=5)
    expected = alone(folders, batch)
    model = serve(folders)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert torch.equal(tiny.logits(model, batch), expected["a"])  # the first is on
    for name in ("c", "a", "b", "a"):
        model.set_task(name)
        assert torch.equal(tiny.logits(model, batch), expected[name])
        assert model.config.num_labels == LABELS[name]
    names = ["b", "a", "c", "a", "b"]
    model.set_task(names)
    found = tiny.logits(model, batch)
    assert found.shape == (5, 5)
    for row, name in enumerate(names):
        close(found[row, : LABELS[name]], expected[name][row])
        assert bool((found[row, LABELS[name] :] == float("-inf")).all())
    model.set_task(["b"] * 5)
    close(tiny.logits(model, batch), expected["b"])


@pytest.mark.parametrize("kind", tiny.kinds(0) + tiny.kinds(1))
def test_each_kind_is_served_row_by_row(kind: str, tmp_path: Path) -> None:
    def rules(number: int) -> list[Rule]:
        return [tiny.rule(kind, "atom", OTHERS.get(kind, {}) if number else {})]

    folders = {name: saved(tmp_path / name, bare("bert"), rules(i), i, 0.5)
               for i, name in enumerate("ab")}
    batch = tiny.inputs("bert", rows=4)
    expected = alone(folders, batch)
    assert not torch.allclose(expected["a"], expected["b"], atol=1e-4)
    model = serve(folders)
    for name in folders:
        model.set_task(name)
        assert torch.equal(tiny.logits(model, batch), expected[name])
    model.set_task(["a", "b", "b", "a"])
    for row, name in enumerate("abba"):
        close(tiny.logits(model, batch)[row], expected[name][row])


def test_tasks_come_and_go(tmp_path: Path) -> None:
    folders, batch = tasks("bert", tmp_path), tiny.inputs("bert")
    expected = alone(folders, batch)
    model = serve({"a": folders["a"]})
    plain = tiny.hooks(with_labels("bert", 3))
    model.add_task("b", folders["b"])
    assert torch.equal(tiny.logits(model, batch), expected["a"])  # still on
    model.set_task("b")
    model.add_task("c", folders["c"])
    assert torch.equal(tiny.logits(model, batch), expected["b"])
    assert {k: len(v) for k, v in model.searchpet.labels.items()} == LABELS
    model.remove_task("a")
    assert torch.equal(tiny.logits(model, batch), expected["b"])
    with pytest.raises(InputError, match=r"one of b, c, but got 'a'"):
        model.set_task("a")
    with pytest.raises(InputError, match="one of b, c, but got 'a'"):
        model.remove_task("a")
    model.remove_task("b")
    with pytest.raises(InputError, match="call set_task"):
        model(**batch)
    model.set_task(["c"] * 3)
    close(tiny.logits(model, batch), expected["c"])
    model.remove_task("c")
    assert tiny.hooks(model) == plain + 1  # the check of rows
    model.add_task("a", folders["a"])
    model.set_task("a")
    assert torch.equal(tiny.logits(model, batch), expected["a"])


def test_wrong_rows_and_names_are_refused(tmp_path: Path) -> None:
    folders, batch = tasks("bert", tmp_path), tiny.inputs("bert")
    model = serve({"a": folders["a"], "b": folders["b"]})
    with pytest.raises(InputError, match="but got none"):
        serve({})
    with pytest.raises(InputError, match="did you mean|one of a, b, but got 'aa'"):
        model.set_task(["a", "aa"])
    with pytest.raises(InputError, match="or one for each row, but got none"):
        model.set_task([])
    for names in (["a", "b"], ["a"], ["a"] * 6):
        model.set_task(names)
        with pytest.raises(InputError, match=rf"has 3 rows and {len(names)} names are set"):
            model(**batch)
    with pytest.raises(InputError, match="'a' is served already"):
        model.add_task("a", folders["a"])
    with pytest.raises(InputError, match=r"saved task by task, but it holds 2"):
        model.save_pretrained(tmp_path / "out")
    with pytest.raises(InputError, match="has deltas already"):
        serve(folders, model=model)


def test_another_backbone_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    folders, batch = tasks("bert", tmp_path), tiny.inputs("bert")
    model = serve({"a": folders["a"]})
    expected, hooks = tiny.logits(model, batch), tiny.hooks(model)
    other = saved(tmp_path / "other", tiny.model("bert", seed=5), tiny.every_kind(), 0)
    gpt = saved(tmp_path / "gpt", bare("gpt2"), tiny.every_kind(), 0)
    for place, message in [(other, "must be of the backbone that is served"),
                           (gpt, "must have heads of the same modules, classifier, but"),
                           (tmp_path / "none", "a spec must be a file or a run folder")]:
        with pytest.raises(InputError, match=message) as caught:
            model.add_task("x", place)
        assert "\n" not in str(caught.value)
        assert torch.equal(tiny.logits(model, batch), expected)
        assert tiny.hooks(model) == hooks and list(model.searchpet.labels) == ["a"]
    damaged = folders["b"] / "delta.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-8])
    with pytest.raises(InputError, match="damaged"):
        model.add_task("b", folders["b"])


WRITERS = ["GPT2LMHeadModel", "LlamaForCausalLM", "T5ForConditionalGeneration"]


@pytest.mark.parametrize("name", WRITERS)
def test_generation_under_one_task_and_with_mixed_rows(name: str, tmp_path: Path) -> None:
    build = getattr(transformers, name)
    family = build.config_class.model_type

    def writer() -> nn.Module:
        config = bare(family).config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = build(config)
            tiny.perturb(model.parameters(), 0.2)
        return model.eval()

    folders = {task: saved(tmp_path / task, writer(), tiny.every_kind(**OTHERS), seed, 0.6)
               for seed, task in enumerate("ab")}
    batch = tiny.inputs(family, rows=4)
    model = serve(folders)
    for options in ({}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2},
                    {"use_cache": False}):
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
        expected = {}
        for task, place in folders.items():
            one: Any = load(place)
            expected[task] = one.generate(**batch, **options)
            model.set_task(task)
            assert torch.equal(model.generate(**batch, **options), expected[task])
        assert not torch.equal(expected["a"], expected["b"])
        model.set_task(list("abba"))
        found = model.generate(**batch, **options)
        times = int(options.get("num_return_sequences", 1))
        for row, task in enumerate("abba"):
            own = slice(row * times, (row + 1) * times)
            assert torch.equal(found[own], expected[task][own])
    with pytest.raises(InputError, match="has 2 rows and 4 names are set"):
        model.generate(**{key: value[:2] for key, value in batch.items()})
    with pytest.raises(InputError, match="has 8 rows and 4 names are set"):
        model.generate(**{key: value.repeat(2, 1) for key, value in batch.items()})


def test_deltas_of_a_classifier_serve_the_model_that_writes(tmp_path: Path) -> None:
    folders = tasks("t5", tmp_path)
    host = transformers.T5ForConditionalGeneration(bare("t5").config).eval()
    host.load_state_dict(bare("t5").transformer.state_dict(), strict=False)
    batch = tiny.inputs("t5") | {"decoder_input_ids": tiny.inputs("t5")["input_ids"]}
    before = tiny.logits(host, batch)
    model = serve({"a": folders["a"], "b": folders["b"]}, model=host)
    assert model is host
    found = {}
    for name in "ab":
        model.set_task(name)
        found[name] = tiny.logits(model, batch)
        assert not torch.allclose(found[name], before, atol=1e-3)
    model.set_task(["a", "b", "a"])
    for row, name in enumerate("aba"):
        close(tiny.logits(model, batch)[row], found[name][row])


def test_a_served_model_is_copied_and_goes_to_half(tmp_path: Path) -> None:
    folders, batch = tasks("bert", tmp_path), tiny.inputs("bert")
    model = serve({"a": folders["a"], "b": folders["b"]})
    other = copy.deepcopy(model)
    other.set_task("b")
    assert torch.equal(tiny.logits(model, batch), alone(folders, batch)["a"])
    assert torch.equal(tiny.logits(other, batch), alone(folders, batch)["b"])
    half = other.to(torch.bfloat16)
    half.set_task(["a", "b", "a"])
    found = tiny.logits(half, batch)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found[1, :2].float(), alone(folders, batch)["b"][1],
                               rtol=0.05, atol=0.05)
    half.add_task("c", folders["a"])
    half.set_task("c")
    assert tiny.logits(half, batch).dtype == torch.bfloat16


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A folder with runs a and b, and `both` on two tasks."""
    folder = tmp_path_factory.mktemp("served")
    with workplace(folder, tiny_folder) as patch:
        write_task(folder / "plays")
        for words in (["--task", "films", "--out", "a"],
                      ["--task", "plays", "--seed", "1", "--out", "b"],
                      ["--task", "films,plays", "--out", "both"]):
            assert main(["search", "--model", "tiny", "--budget", "5%", "--steps", "4",
                         "--controls", "0", "--quiet", *words]) == 0
        patch.undo()
    return folder


def test_runs_are_served(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)
    ids = torch.randint(5, 100, (4, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = {"a": tiny.logits(load("a"), batch), "b": tiny.logits(load("b"), batch),
                "plays": tiny.logits(load("both", task="plays"), batch)}
    model = serve({"a": "a", "b": "b", "plays": "both"})
    for name, logits in expected.items():
        model.set_task(name)
        assert torch.equal(tiny.logits(model, batch), logits)
        assert model.config.id2label == {0: "neg", 1: "pos"}
    model.set_task(["plays", "a", "b", "a"])
    for row, name in enumerate(["plays", "a", "b", "a"]):
        close(tiny.logits(model, batch)[row], expected[name][row])
    with pytest.raises(InputError, match="one that the run has learned, films, plays"):
        model.add_task("c", "both")
    monkeypatch.setattr(model.config, "model_type", "xlnet")
    model.set_task("a")
    with pytest.raises(InputError, match="those of xlnet see tokens first; set one task"):
        model.set_task(["a", "b", "a", "b"])  # as many rows as tokens: it could not be seen


def test_runs_and_saved_folders_meet_on_one_backbone(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    load("b").save_pretrained(tmp_path / "b")
    ids = torch.randint(5, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    model = serve({"b": tmp_path / "b", "a": "a"})
    for name in "ba":
        model.set_task(name)
        assert torch.equal(tiny.logits(model, {"input_ids": ids}),
                           tiny.logits(load(name), {"input_ids": ids}))
    alone = serve({"b": tmp_path / "b"})
    with pytest.raises(InputError, match="a revision that nobody knows"):
        alone.add_task("a", "a")


def test_a_run_on_other_weights_is_refused(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    from transformers import BertModel

    other = BertModel.from_pretrained("tiny")
    tiny.perturb(other.parameters(), 0.1)
    other.save_pretrained("other")
    for file in Path("tiny").glob("token*"):
        (Path("other") / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InputError, match=r"must be of the backbone that is served.*and this one"):
        serve({"a": "a"}, model="other")
    masked = Spec.load("b")
    site = next(e for e in masked.entries)
    entry = site.model_copy(update={"kind": "ranks", "options": {}, "kept": [0]})
    changed = masked.model_copy(update={"entries": (entry,)})
    Path("masked").mkdir()
    changed.save("masked/spec.json")
    tensors, metadata = RunFolder("b").read_tensors("delta.safetensors")
    about = json.loads(metadata["searchpet"]) | {"spec_hash": changed.hash}
    RunFolder("masked").write_tensors("delta.safetensors", tensors,
                                      {"searchpet": json.dumps(about)})
    with pytest.raises(InputError, match="share the backbone's weights, but task 'm' masks them"):
        serve({"a": "a", "m": "masked"})


def test_the_front_door_serves() -> None:
    assert searchpet.serve is serve

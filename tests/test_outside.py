"""PEFT's own methods, trained in the one loop: sizes, budgets, pruning, crashes, errors."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from searchpet.errors import InputError
from searchpet.grid import run_grid
from searchpet.gridfile import read_grid
from searchpet.outside import NAMES, Outside
from searchpet.session import Session
from searchpet.settings import Settings
from tests.commands import cut_off, workplace
from tests.laws import families as tiny

pytest.importorskip("peft")

RANK = 32 + 32 + 1  # of AdaLoRA on a matrix of the tiny model
GRID = """
tasks = ["films"]
budgets = ["2%"]
seeds = [0, 1]
taus = [0.1, 1]
steps = 8
batch_size = 16
max_length = 16
model = "tiny"
methods = ["peft_default", "adalora", {{ name = "kappa", budget = {budget} }}]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Any:
    folder = tmp_path_factory.mktemp("outside")
    with workplace(folder, tiny_folder):
        (folder / "grid.toml").write_text(GRID.format(budget=600))
        yield folder


@pytest.fixture(scope="module")
def session(place: Path) -> Session:
    return Session(Settings(model="tiny", task="films", data=".", steps=12, batch_size=16,
                            max_length=16))


def attached(name: str, limit: int | None = None, family: str = "bert", steps: int = 12) -> Any:
    model = tiny.model(family)
    head = tiny.head_of(model)
    return model, head, Outside(name, limit).attach(model, head, steps, 0)


# --- what is attached ----------------------------------------------------------------------------


def test_the_default_is_what_peft_makes_when_nothing_is_said() -> None:
    from peft import LoraConfig, get_peft_model

    model, head, found = attached("peft_default")
    other = get_peft_model(tiny.model("bert"), LoraConfig())
    assert found.kept() == found.most == other.get_nb_trainable_parameters()[0]
    own = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in own if "lora_" not in n} == head
    assert {n.split(".lora_")[0].rpartition(".")[2] for n in own - head} == {"query", "value"}


@pytest.mark.parametrize("name", NAMES)
def test_it_begins_silent_and_its_seed_says_how(name: str) -> None:
    limit = None if name == "peft_default" else 400
    model, _, _ = attached(name, limit)
    assert torch.equal(tiny.logits(model.eval(), tiny.inputs("bert")),
                       tiny.logits(tiny.model("bert").eval(), tiny.inputs("bert")))
    again = dict(attached(name, limit)[0].named_parameters())
    assert all(torch.equal(p, again[n]) for n, p in model.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("limit", [64, 200, 500, 2000, 20_000])
def test_kappa_spends_no_more_than_the_budget(limit: int) -> None:
    model, head, found = attached("kappa", limit)
    assert 0 < found.kept() <= limit
    owners = {name.rpartition(".")[0] for name in head}
    linear = [m for n, m in tiny.model("bert").named_modules()
              if isinstance(m, nn.Linear) and n not in owners]
    assert len(found.layers) <= max(1, len(linear) // 5)
    assert not any(name in head for name, m in model.named_modules() if m in found.layers)


def test_kappa_takes_the_matrices_of_lowest_condition_number() -> None:
    _, head, found = attached("kappa", 10**6)
    owners = {name.rpartition(".")[0] for name in head}
    kappa = {}
    for name, module in tiny.model("bert").named_modules():
        if isinstance(module, nn.Linear) and name not in owners:
            s = torch.linalg.svdvals(module.weight.detach())
            kappa[name] = float(s[0] / s[-1])
    best = sorted(kappa, key=kappa.__getitem__)[: len(kappa) // 5]
    model_of = tiny.model("bert")
    shapes = sorted(tuple(model_of.get_submodule(n).weight.shape) for n in best)
    assert sorted((m.out_features, m.in_features) for m in found.layers) == shapes


@pytest.mark.parametrize("name", ["adalora", "kappa"])
def test_a_budget_below_one_rank_says_what_one_costs(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} must be able to pay a rank, [0-9]+ parameters "):
        attached(name, 5)


def test_a_model_that_peft_does_not_know_is_one_line() -> None:
    model = tiny.model("albert")
    with pytest.raises(InputError, match="needs a model that PEFT knows") as caught:
        Outside("adalora", 500).attach(model, tiny.head_of(model), 12, 0)
    assert "\n" not in str(caught.value)


def test_the_head_is_never_a_target() -> None:
    """PEFT's table has `dense` for RoBERTa, which its head has as well."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    model = RobertaForSequenceClassification(RobertaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=32))
    head = tiny.head_of(model)
    Outside("adalora", 4000).attach(model, head, 12, 0)
    own = {n for n, p in model.named_parameters() if p.requires_grad}
    assert head <= own and any(".output.dense.lora_A" in n for n in own)
    assert not any("classifier" in n for n in own if "lora_" in n)


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_training_counts_what_is_left(name: str, session: Session) -> None:
    limit = None if name == "peft_default" else 3 * RANK + 5
    outcome = session.fit(Outside(name, limit), None, 0, tau=0.3)
    assert outcome.trainable <= (limit or 10**9) and outcome.most
    assert (outcome.most > outcome.trainable) == (name == "adalora")
    assert outcome.head == session.head_size and outcome.history[0][0] == 0
    if name == "adalora":
        assert outcome.trainable == 3 * RANK and outcome.step > 6  # judged when all is pruned
    with session.fresh(0) as model:  # the next one gets the backbone as it was
        assert not any("lora_" in n for n, _ in model.named_parameters())


def test_adalora_computes_with_what_it_counts_alone(session: Session) -> None:
    seen: list[Any] = []

    def note(model: nn.Module) -> None:
        seen.extend(p.detach().clone() for n, p in model.named_parameters() if "lora_E" in n)

    outcome = session.fit(Outside("adalora", 4 * RANK), None, 0, tau=0.3, after=note)
    assert sum(int((e != 0).sum()) for e in seen) == outcome.trainable // RANK == 4


def test_other_rates_are_calibrated_as_ours(session: Session) -> None:
    """PEFT's LoRA of rank 8 is our kind lora with rank 8 and alpha 8: the same probe."""
    from searchpet.calibrate import probe
    from searchpet.discover import discover
    from searchpet.grafts import Graft, Grafts
    from searchpet.supernet import seeded

    batch = tiny.inputs("bert", rows=3) | {"labels": torch.tensor([0, 1, 2])}
    model, _, found = attached("peft_default")
    model.eval()
    theirs = probe(found, lambda: model(**batch).loss)["peft"]
    plain = tiny.model("bert").eval()
    sites = [s for s in discover(plain) if s.path.endswith(("query", "value"))]
    ours = Grafts(plain, [Graft(s, "lora", seeded(s, "lora", {"rank": 8, "alpha": 8.0}, 0))
                          for s in sites])
    for mine, layer in zip(ours.grafts, found.layers, strict=True):
        mine.delta.A.data.copy_(layer.lora_A["default"].weight)
    assert theirs == pytest.approx(probe(ours, lambda: plain(**batch).loss)["lora"], rel=1e-3)


# --- in a grid -----------------------------------------------------------------------------------


def lines(folder: Path, name: str = "results.jsonl") -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in rows]


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    run_grid("grid.toml", data=".", out="whole", say=lambda line: None)
    return place / "whole"


def test_a_grid_trains_them_as_it_trains_ours(whole: Path) -> None:
    rows = lines(whole)
    found = {(r["method"], r["seed"]): r for r in rows}
    assert set(found) == {(m, s) for m in ("peft_default", "adalora", "kappa") for s in (0, 1)}
    backbone = 25408
    for (name, _), row in found.items():
        assert row["split"] == "test" and row["tau"] in (0.1, 1)
        limit = {"peft_default": row["trainable"], "adalora": 508, "kappa": 600}[name]
        assert 0 < row["trainable"] <= limit
        assert row["budget"] == pytest.approx(0.02 if name == "adalora" else limit / backbone)
    assert len(lines(whole, "sweep.jsonl")) == 6
    assert found["adalora", 0]["most"] > found["adalora", 0]["trainable"] == 7 * RANK


@pytest.mark.slow
def test_a_killed_grid_goes_on_to_the_same_lines(whole: Path, place: Path) -> None:
    words = ["grid", "grid.toml", "--data", ".", "--out", "killed", "--quiet"]
    done = cut_off(words, "SIGKILL train 35", place)  # four trainings of eight steps came before
    assert done.returncode == -9, done.stderr
    assert list((place / "killed").rglob("adalora/*/*.checkpoint.safetensors"))
    run_grid("grid.toml", data=".", out="killed", say=lambda line: None)
    assert lines(place / "killed") == lines(whole)
    assert lines(place / "killed", "sweep.jsonl") == lines(whole, "sweep.jsonl")


@pytest.mark.parametrize(("method", "message"), [
    ('{ name = "adalora", space = "wide" }', "takes budget and name alone, but has space"),
    ('{ name = "peft_default", budget = 50 }', "takes name alone, but has budget"),
    ('{ name = "kappa", structures = 3 }', "but has structures"),
])
def test_they_take_no_settings_of_ours(place: Path, method: str, message: str) -> None:
    text = (place / "grid.toml").read_text().split("methods")[0]
    (place / "wrong.toml").write_text(f"{text}methods = [{method}]\n")
    with pytest.raises(InputError, match=message):
        read_grid(place / "wrong.toml")


def test_without_peft_the_grid_says_so(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *more: None if name == "peft" else find(name, *more))
    with pytest.raises(InputError, match=r"method peft_default needs peft, which .*\[export\]"):
        read_grid(place / "grid.toml")

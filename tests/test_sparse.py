"""Sparse PET: exactly the budget's parameters stay, the others are 0 and never move."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import searchpet
from searchpet import cli
from searchpet.spec import Spec
from tests.commands import write_task

JOB = ["search", "--model", "tiny", "--task", "films", "--strategy", "sparse_adapter", "--budget",
       "700", "--steps", "8", "--batch-size", "8", "--max-length", "16", "--tau", "0.5",
       "--controls", "0", "--quiet"]
SCORES = ["random", "magnitude", "snip", "fisher", "grasp", "movement"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Path]:
    """A folder with a task, a backbone, and a run for each score."""
    folder = tmp_path_factory.mktemp("sparse")
    write_task(folder / "films")
    (folder / "tiny").symlink_to(tiny_folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("SEARCHPET_DATA", raising=False)
        for score in SCORES:
            words = [*JOB, "--space", "adapters", "--set", f"sparse_adapter.score={score}"]
            assert cli.main([*words, "--out", score]) == 0
        assert cli.main([*JOB, "--space", "lora_ranks", "--set",
                         "sparse_adapter.allocation=erdos_renyi", "--out", "ranks"]) == 0
        yield folder


@pytest.mark.parametrize("run", [*SCORES, "ranks"])
def test_exactly_the_budget_stays(home: Path, run: str) -> None:
    spec = Spec.load(run)
    assert spec.budget.used == 700 == sum(e.mask.count for e in spec.entries if e.mask)
    stored = load_file(Path(run, "delta.safetensors"))
    assert sum(t.numel() for name, t in stored.items() if not name.startswith("head/")) == 700
    assert json.loads(Path(run, "result.json").read_text())["trainable"] == 700
    assert cli.main(["verify", run]) == 0


@pytest.mark.parametrize("run", ["snip", "ranks"])
def test_what_is_masked_is_zero_and_never_moves(home: Path, run: str) -> None:
    model = searchpet.load(run).train()
    grafts = [g for g in model.searchpet.grafts if g.sparse]
    weights = [p for g in grafts for p in g.delta.parameters()]
    masks = [g.sparse[name] for g in grafts for name, _ in g.delta.named_parameters()]
    before = [p.detach().clone() for p in weights]
    optimizer = torch.optim.AdamW(weights, lr=0.1, weight_decay=0.1)
    ids = torch.arange(24).view(2, 12)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
    assert any(not torch.equal(p, old) for p, old in zip(weights, before, strict=True))
    for p, mask in zip(weights, masks, strict=True):
        assert not p[~mask].any()


def test_the_loaded_run_scores_what_was_measured(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", "snip", "--json"]) == 0
    score = json.loads(Path("snip/result.json").read_text())["score"]
    assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(score)


def test_scores_choose_differently(home: Path) -> None:
    found = {json.dumps([e.mask.sha256 for e in Spec.load(run).entries if e.mask])
             for run in SCORES}
    assert len(found) == len(SCORES)


def test_movement_takes_as_many_steps_as_it_is_given(home: Path) -> None:
    """More steps move more; the masks are others than after ten."""
    words = [*JOB, "--space", "adapters", "--set", "sparse_adapter.score=movement"]
    assert cli.main([*words, "--set", "sparse_adapter.warmup=30", "--out", "long"]) == 0
    masks = [[e.mask.sha256 for e in Spec.load(run).entries if e.mask]
             for run in ("movement", "long")]
    assert masks[0] != masks[1]


@pytest.mark.parametrize(("words", "message"), [
    (["--keep-flops", "60%"], "sparse_adapter searches PET alone"),
    (["--budget", "20000", "--space", "adapters"], "is above all"),
    (["--set", "sparse_adapter.score=wanda"], "but wanda is of weights of the backbone"),
    (["--set", "sparse_adapter.warmup=0"], "sparse_adapter.warmup must be at least 1"),
    (["--set", "sparse_adapter.allocation=best"], "allocation"),
])
def test_what_cannot_be_asked_is_one_line(
    home: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*JOB, *words, "--out", "wrong"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1

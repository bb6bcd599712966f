"""Masks of single weights: chosen exactly, stored as bits beside the spec, and honoured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import searchpet
from searchpet import catalog, cli
from searchpet.bulk import Bulk
from searchpet.discover import discover
from searchpet.errors import InputError
from searchpet.masks import legal_n_m
from searchpet.spec import Spec
from tests.commands import write_task
from tests.laws import families as tiny
from tests.laws.problems import Draws, problem

JOB = ["search", "--model", "tiny", "--task", "films", "--budget", "2%", "--strategy",
       "prune_first", "--steps", "6", "--batch-size", "8", "--max-length", "16", "--tau", "0.5",
       "--controls", "0", "--quiet"]
WEIGHTS = 2 * (4 * 32 * 32 + 2 * 32 * 64)  # of the tiny BERT's matrices in blocks


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Path]:
    """A folder with a task, a backbone, and runs that keep half of the weights."""
    folder = tmp_path_factory.mktemp("bulk")
    write_task(folder / "films")
    (folder / "tiny").symlink_to(tiny_folder)
    (folder / "blocks.toml").write_text(
        'description = "tiles"\n[[rule]]\nkind = "blocks"\ngrain = "atom"\n'
        'options = {rows = 4, columns = 4}\nselect = {role = "ffn.*"}\n')
    rule = '[[rule]]\nkind = "{}"\ngrain = "atom"\nselect = {{role = "{}"}}\n'
    for name, kinds in (("twice", ("weights", "n_m")), ("mixed", ("weights", "heads"))):
        (folder / f"{name}.toml").write_text('description = "two sorts"\n' + "".join(
            rule.format(kind, "attention.output") for kind in kinds))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("SEARCHPET_DATA", raising=False)
        for name, masks, share in (("free", "prune/weights", "30%"),
                                   ("two_four", "prune/two_four", "50%"),
                                   ("tiles", "blocks.toml", "70%")):
            words = [*JOB, "--keep-weights", share, "--masks", masks, "--out", name]
            assert cli.main(words) == 0
        yield folder


def nonzero(run: str) -> dict[str, torch.Tensor]:
    """Kept elements of each matrix of the loaded model."""
    model = searchpet.load(run)
    paths = {g.at for g in model.searchpet.grafts if g.delta.stage == "weight"}
    return {path: model.get_submodule(path).weight.detach() != 0 for path in paths}


@pytest.mark.parametrize(("run", "share"), [("free", 0.3), ("two_four", 0.5), ("tiles", 0.7)])
def test_exactly_the_asked_share_stays(home: Path, run: str, share: float) -> None:
    spec, kept = Spec.load(run), nonzero(run)
    assert spec.keep and spec.keep.dense == WEIGHTS
    assert spec.keep.limit == int(share * WEIGHTS)
    covered = sum(mask.numel() for mask in kept.values())
    total = WEIGHTS - covered + sum(int(mask.sum()) for mask in kept.values())
    assert spec.keep.used == total <= spec.keep.limit
    assert total > spec.keep.limit - 16  # less than a tile below


def test_two_of_four_stay_in_every_row(home: Path) -> None:
    assert all(legal_n_m(mask, 2, 4) for mask in nonzero("two_four").values())


def test_tiles_are_whole(home: Path) -> None:
    for mask in nonzero("tiles").values():
        tiles = mask.unfold(0, 4, 4).unfold(1, 4, 4).sum((-1, -2))
        assert set(tiles.unique().tolist()) <= {0, 16}


def test_the_pretrained_weights_stay_where_they_are_kept(home: Path) -> None:
    model, dense = searchpet.load("free"), searchpet.load("free", remove=False)
    dense.searchpet.detach()
    for path, mask in nonzero("free").items():
        whole, masked = (m.get_submodule(path).weight for m in (dense, model))
        assert torch.equal(masked, whole * mask) and bool((whole != 0).all())
    names = {name for name, _ in dense.named_parameters()}
    assert not any("parametrizations" in name for name in names)
    assert discover(dense)  # whole again


def test_the_run_evaluates_verifies_and_trains_again(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = json.loads(Path("free/result.json").read_text())
    assert not result["removed"]
    assert cli.main(["evaluate", "free", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(result["score"])
    assert cli.main(["verify", "free"]) == 0
    said = capsys.readouterr().out
    assert "weights that are left" in said and "WRONG" not in said
    assert cli.main(["show", "free"]) == 0
    assert "of the blocks' weights" in capsys.readouterr().out
    words = ["train", "free", "--steps", "4", "--batch-size", "8", "--seed", "1", "--quiet"]
    assert cli.main([*words, "--out", "again"]) == 0
    before, after = nonzero("free"), nonzero("again")
    assert all(torch.equal(mask, after[path]) for path, mask in before.items())  # locked


def test_merging_keeps_the_zeros_or_refuses(home: Path) -> None:
    ids = torch.arange(20).view(2, 10)
    model = searchpet.load("tiles")
    kept = nonzero("tiles")
    updated = {g.at for g in model.searchpet.grafts if g.kind == "lora"}
    before = model(input_ids=ids).logits.detach()
    if updated & kept.keys():
        with pytest.raises(InputError, match="would fill the zeros"):
            searchpet.merge(model)
        assert torch.equal(model(input_ids=ids).logits, before)  # nothing has changed
    searchpet.merge(model, keep_zeros=True)
    for path, mask in kept.items():
        assert not model.get_submodule(path).weight[~mask].any()
    if not updated & kept.keys():
        torch.testing.assert_close(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("what", ["absent", "changed", "gone", "broken"])
def test_masks_that_are_not_the_specs_are_refused(
    home: Path, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree("free", run)
    file = run / "masks.safetensors"
    bits = load_file(file)
    name = min(bits)
    if what == "absent":
        file.unlink()
    elif what == "broken":
        file.write_bytes(file.read_bytes()[:100])
    else:
        if what == "changed":
            bits[name] = bits[name] ^ 1
        else:
            del bits[name]
        save_file(bits, file)
    assert cli.main(["evaluate", str(run)]) == 2
    said = capsys.readouterr().err
    assert "masks.safetensors" in said and said.count("\n") == 1


@pytest.mark.parametrize(("words", "message"), [
    (["--keep-flops", "50%", "--masks", "prune/weights"], "save no FLOPs"),
    (["--keep-weights", "40%", "--masks", "prune/two_four"], "by their rule"),
    (["--keep-weights", "20%", "--masks", "blocks.toml"], "must leave what no mask covers"),
    (["--keep-weights", "50%", "--masks", "prune/weights", "--strategy", "bilevel"],
     "chooses no masks of weights"),
    (["--keep-weights", "85%", "--masks", "twice.toml"],
     "layer.0.attention.output.dense has weights and n_m"),
    (["--keep-weights", "60%", "--masks", "mixed.toml"], "cannot be searched together"),
    (["--keep-weights", "50%", "--masks", "prune/weights", "--set", "prune_first.score=movement"],
     "needs a training"),
])
def test_what_cannot_be_asked_is_one_line(
    home: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*JOB, *words, "--out", "wrong"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    log = home / "wrong" / "log.jsonl"
    assert not log.is_file() or "search" not in log.read_text()  # said before any work


def test_scores_in_a_later_round_are_those_of_the_pruned_model() -> None:
    """Wanda under the masks of a first call: as on a model whose weights are really zero there."""
    def bulk_on(model: torch.nn.Module) -> Bulk:
        space = tiny.space(model, tiny.rule("weights", "atom", role=["attention.*", "ffn.*"]))
        return Bulk(space, model, 0.4, "40%", lambda b: model(**b).loss, torch.Generator())

    model, other = tiny.model("bert"), tiny.model("bert")
    before = {name: p.clone() for name, p in model.named_parameters()}
    batches = [Draws(0)[i] for i in range(3)]
    bulk = bulk_on(model)
    first = {key: gate.clone() for key, gate in bulk.settle(
        "wanda", "global", batches, ease=0.5).gates.items()}
    bulk.settle("wanda", "global", batches)
    with torch.no_grad():
        for key, gate in first.items():
            other.get_submodule(key.split(":")[0]).weight.mul_(gate)
    apart = bulk_on(other).settle("wanda", "global", batches)
    assert all(torch.equal(gate, apart.gates[key]) for key, gate in bulk.gates.items())
    assert all(bool((bulk.gates[key] <= gate).all()) for key, gate in first.items())
    fresh = bulk_on(tiny.model("bert")).settle("wanda", "global", batches)
    assert any(not torch.equal(gate, fresh.gates[key]) for key, gate in bulk.gates.items())
    bulk.remove()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("rounds", [1, 3])
def test_prune_first_in_rounds_meets_the_limit(rounds: int) -> None:
    model = tiny.model("bert")
    space = tiny.space(model, tiny.rule("bias", "channel"), tiny.rule("weights", "atom"))
    given = problem(model, space, 40, steps=2)
    bulk = Bulk(space, model, 0.4, "40%", given.loss, given.generator)
    eases = []

    def settle(*args: Any, ease: float) -> Any:
        eases.append(ease)
        return bulk.settle(*args, ease=ease)

    given.settle_weights = settle
    catalog.get("strategies", "prune_first")(given, score="snip", rounds=rounds, pet="random")
    assert bulk.use().used == bulk.limit
    assert eases == pytest.approx([(1 - (i + 1) / rounds) ** 3 for i in range(rounds)])
    with pytest.raises(InputError, match=r"prune_first.rounds must be at least 1"):
        catalog.get("strategies", "prune_first")(given, rounds=0)

"""DSEE: low rank plus a fixed sparse support, heads and neurons removed evenly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import searchpet
from searchpet import catalog, cli
from searchpet.allocate import top
from searchpet.bulk import read_bits, read_mask
from searchpet.discover import discover
from searchpet.errors import InputError
from searchpet.limits import Limits
from searchpet.merge import merge
from searchpet.probe import outputs
from searchpet.pruning import Prune, keep_of
from searchpet.space import Space
from searchpet.spec import Spec
from searchpet.strategies import Problem, Ranking
from searchpet.tickets import magnitudes
from searchpet.updates import low_rank_sparse, matrix_of
from tests.commands import cut_off, workplace
from tests.laws import families as tiny
from tests.laws.problems import problem

QUERY_VALUE = {"role": ["attention.query", "attention.value"]}
PET = [tiny.rule("lora", options={"rank": 4}, **QUERY_VALUE), tiny.rule("matrix", **QUERY_VALUE)]
MASKS = [tiny.rule("heads", "atom"), tiny.rule("neurons", "atom", {"most": 6, "multiple": 2})]
ENTRIES, RANK = 20, 4
LORA = 4 * RANK * (32 + 32)  # of the tiny BERT: two layers, query and value
JOB = ["search", "--model", "tiny", "--task", "films", "--strategy", "dsee", "--space", "dsee",
       "--set", f"dsee.entries={ENTRIES}", "--steps", "8", "--batch-size", "8", "--max-length",
       "16", "--tau", "0.5", "--controls", "0", "--quiet"]
RUNS = {"plain": [], "flops": ["--keep-flops", "70%"],
        "weights": ["--keep-weights", "60%", "--masks", "prune/weights"]}
every_run = pytest.mark.parametrize("run", RUNS)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Path]:
    """A folder with a task, a backbone, and a run without a limit, and with each sort of it."""
    folder = tmp_path_factory.mktemp("dsee")
    with workplace(folder, tiny_folder) as patch:
        for name, words in RUNS.items():
            line = [*JOB, "--budget", str(LORA + 4 * ENTRIES), *words, "--out", name]
            patch.setattr("sys.argv", ["searchpet", *line])
            assert cli.main(line) == 0
        yield folder


def searched(model: nn.Module, share: str = "", **hyperparameters: Any) -> tuple[
        Ranking, Problem]:
    """The strategy on a model, with a limit on FLOPs if there is a share."""
    space = Space("test", discover(model), [*PET, *(MASKS if share else [])])
    limit = keep_of(Prune("flops", share), model, space) if share else None  # of the bare model
    given = problem(model, space, 10**6, steps=3)
    given.keep = limit
    search = catalog.get("strategies", "dsee")
    return search(given, **{"entries": ENTRIES, **hyperparameters}), given


# --- what a low rank does not explain -----------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_planted_entries_are_found_where_their_size_alone_hides_them(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    planted = torch.zeros(60 * 80, dtype=torch.bool)
    planted[torch.randperm(60 * 80, generator=generator)[:40]] = True
    planted = planted.view(60, 80)
    low = normal(60, 4) @ normal(4, 80)
    weight = low + torch.where(planted, 2 * normal(60, 80).sign(), 0.0) + 0.02 * normal(60, 80)
    parts = low_rank_sparse(weight, 4, 40)
    assert torch.equal(parts.sparse != 0, planted)
    assert int(torch.linalg.matrix_rank(parts.low)) == 4
    torch.testing.assert_close(parts.low, low.double(), rtol=0, atol=0.1)
    assert int((top(weight.abs(), 40) & planted).sum()) < 10


@pytest.mark.parametrize(("rank", "entries", "message"), [
    (0, 5, r"rank .* in \[1, 3\] .* got 0"), (4, 5, "got 4"), (2, 0, "from 1 to 24"),
    (2, 25, "got 25")])
def test_parts_that_cannot_be_are_refused(rank: int, entries: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        low_rank_sparse(torch.ones(4, 6), rank, entries)


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_merged_matrices_are_those_of_a_merge(family: str) -> None:
    """Also where query and value are rows of one fused, transposed matrix."""
    model = tiny.model(family)
    net = tiny.supernet(model, Space("test", discover(model), PET))
    before = {s.path: matrix_of(model, s).clone() for s in net.space.sites if s.form == "linear"
              and not s.index}
    found = magnitudes(net)
    for path, weight in before.items():
        assert torch.equal(matrix_of(model, next(
            s for s in net.space.sites if s.path == path)), weight)  # nothing has changed
    model.searchpet = net.grafts
    merge(model)
    changed = {p.site.path for p in net.space.placements}
    for site in net.space.sites:
        if site.form == "linear":
            rows = torch.cat([torch.arange(a, b) for a, b in site.index or ((0, site.d_out),)])
            torch.testing.assert_close(found[site.path][rows], matrix_of(model, site).abs())
            assert site.path in changed or torch.equal(before[site.path].abs(), found[site.path])


# --- the strategy -------------------------------------------------------------------------------


def test_the_shares_that_save_a_quarter_and_a_third_of_bert_base() -> None:
    """The figures of the strategy's docstring, by this project's own count."""
    sizes = {"num_hidden_layers": 1, "vocab_size": tiny.WORDS}  # all layers cost the same
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
    masks = [tiny.rule("heads", "atom"), tiny.rule("neurons", "atom")]
    space = Space("test", discover(model), [*PET, *masks])
    half = keep_of(Prune("flops", "50%"), model, space)
    limits = Limits(space, 1, half)

    def saved(heads: float, neurons: float) -> float:
        keep = torch.ones(len(space), dtype=torch.bool)
        for p in space.placements:
            share = {"heads": heads, "neurons": neurons}.get(p.kind, 0.0)
            keep[space.unit[p.start : p.start + round(share * p.width)]] = False
        return 1 - limits.kept(keep) / half.cost.dense

    linears, all_heads = 4 * 768**2 + 2 * 768 * 3072, 4 * 768**2
    assert 0.25 * all_heads / linears == pytest.approx(0.083, abs=5e-4)
    assert saved(0.25, 0.0) == pytest.approx(0.088, abs=5e-4)
    assert saved(0.25, 0.25) == pytest.approx(0.25, abs=1e-9)
    assert saved(0.25, 0.406) == pytest.approx(0.35, abs=5e-3)
    for share, neurons in (("75%", 0.25), ("65%", 26 / 64)):
        limit = keep_of(Prune("flops", share), model, space)
        given = problem(model, space, 10**6, steps=1)
        given.keep = limit
        ranking = catalog.get("strategies", "dsee")(given)
        given.net.remove()
        gone = {p.kind: 1 - ranking.keep[space.unit[p.start : p.start + p.width]].double().mean()
                for p in space.placements if p.neutral == 1}
        assert gone == {"heads": 0.25, "neurons": neurons}
        assert given.limits.kept(ranking.keep) <= given.keep.limit


@pytest.mark.parametrize("score", ["abs", "wabs", "random"])
def test_the_same_share_goes_in_every_layer_and_no_more_than_needed(score: str) -> None:
    ranking, given = searched(tiny.model("bert"), "55%", score=score, heads=0.5)
    limits, space = given.limits, given.space
    counts = {kind: {int(ranking.keep[space.unit[p.start : p.start + p.width]].sum())
                     for p in space.placements if p.kind == kind} for kind in ("heads", "neurons")}
    assert counts["heads"] == {1} and len(counts["neurons"]) == 1
    assert limits.kept(ranking.keep) <= given.keep.limit
    for p in space.placements:  # one group more in every layer would be too much
        units = space.unit[p.start : p.start + p.width]
        if p.kind == "neurons":
            ranking.keep[units[int((~ranking.keep[units]).nonzero()[0])]] = True
    assert limits.kept(ranking.keep) > given.keep.limit


@pytest.mark.parametrize("score", ["abs", "wabs"])
def test_heads_and_neurons_that_nothing_reads_go_first(score: str) -> None:
    """Nothing is learned for a head whose columns of the output are 0: no update, lowest score."""
    model, useless = tiny.model("bert"), []
    space = Space("test", discover(model), MASKS)
    with torch.no_grad():
        for number, p in enumerate(space.placements):
            groups = [number // 2 % 2] if p.kind == "heads" else [1, 4]
            for group in groups:
                model.get_submodule(p.site.path).weight[:, group * p.run : (group + 1) * p.run] = 0
                useless.append((p.site.path, group))
        for name, weight in model.named_parameters():  # else |W| alone may decide `wabs`
            if name.endswith(("query.weight", "value.weight")):
                weight.mul_(1e-6)
    ranking, given = searched(model, "55%", score=score, heads=0.5)
    space = given.space
    gone = [(p.site.path, c) for p in space.placements if p.neutral == 1 for c in range(p.width)
            if not ranking.keep[space.unit[p.start + c]]]
    assert set(useless) <= set(gone) and len(gone) < len(given.limits.prune)


def test_without_update_wabs_goes_by_the_weights_and_abs_by_the_update() -> None:
    kept = {}
    for score in ("abs", "wabs"):
        model = tiny.model("bert")
        for layer in model.bert.encoder.layer:
            with torch.no_grad():
                layer.attention.self.query.weight[:8] *= 100  # the first head
                layer.attention.output.dense.weight[:, :8] = 0  # which nothing reads
        ranking, given = searched(model, "90%", score=score, heads=0.5)
        kept[score] = [ranking.keep[given.space.unit[p.start : p.start + p.width]].tolist()
                       for p in given.space.placements if p.kind == "heads"]
    assert kept == {"abs": [[False, True]] * 2, "wabs": [[True, False]] * 2}


def test_the_support_is_the_decompositions_on_the_rows_that_stay() -> None:
    model = tiny.model("bert")
    weights = {s.path: matrix_of(model, s) for s in discover(model) if s.form == "linear"}
    dense, _ = searched(model)
    pruned, given = searched(tiny.model("bert"), "80%", heads=0.5)
    for graft in given.net.grafts.grafts:
        if graft.kind == "matrix":
            parts = low_rank_sparse(weights[graft.site.path], RANK, ENTRIES)
            assert torch.equal(dense.masks[graft.key].view(16, 16), parts.sparse != 0)
            live = given.limits.hosts.live(graft.site, pruned.keep)
            assert len(live.outs) == 8
            rest = (weights[graft.site.path] - parts.low).abs()[live.outs]
            mask = pruned.masks[graft.key].view(8, 16)
            assert int(mask.sum()) == ENTRIES and rest[mask].min() >= rest[~mask].max()
            learned = graft.delta.matrix.detach() != 0
            assert learned.any() and not (learned & (parts.sparse == 0)).any()


def test_masks_of_weights_go_by_what_is_there_after_the_training() -> None:
    model, seen = tiny.model("bert"), []
    space = Space("test", discover(model), PET)
    given = problem(model, space, 10**6, steps=3)
    given.settle_weights = lambda *words: seen.append(words)
    catalog.get("strategies", "dsee")(given, entries=ENTRIES)
    ((scores, allocation, _),) = seen
    assert allocation == "global"
    model.searchpet = given.net.grafts
    before = {path: matrix_of(model, s) for s in space.sites if (path := s.path) in scores}
    merge(model)
    for site in space.sites:
        if site.form == "linear":
            torch.testing.assert_close(scores[site.path], matrix_of(model, site).abs())
            trained = site.role in QUERY_VALUE["role"]
            assert torch.equal(scores[site.path], before[site.path].abs()) != trained


# --- from the command line ----------------------------------------------------------------------


def supports(run: str) -> dict[str, torch.Tensor]:
    """Masks of the matrices, in the shapes of what is left."""
    spec = Spec.load(run)
    bits = read_bits(spec)
    model = searchpet.load(run)
    own = {g.key: g.delta.matrix.shape for g in model.searchpet.grafts if g.kind == "matrix"}
    return {e.key: read_mask(e, bits).view(own[e.key]) for e in spec.entries if e.key in own}


@every_run
def test_exactly_so_many_entries_a_matrix_train_count_and_are_stored(
    home: Path, run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, model = Spec.load(run), searchpet.load(run)
    d_out = 24 if run == "flops" else 32  # 3 of 4 heads
    masks = supports(run)
    assert len(masks) == 4
    for mask in masks.values():
        assert mask.shape == (d_out, 32) and int(mask.sum()) == ENTRIES
    stored = load_file(Path(run, "delta.safetensors"))
    sizes: dict[str, int] = {}
    for name, tensor in stored.items():
        if not name.startswith("head/"):
            site = name.rpartition(":")[0]
            sizes[site] = sizes.get(site, 0) + tensor.numel()
    assert list(sizes.values()) == [RANK * (32 + d_out) + ENTRIES] * 4
    assert spec.budget.used == sum(sizes.values()) <= spec.budget.limit
    assert json.loads(Path(run, "result.json").read_text())["trainable"] == spec.budget.used
    assert sum(g.parameters for g in model.searchpet.grafts) == spec.budget.used
    assert cli.main(["verify", run]) == 0
    assert "WRONG" not in capsys.readouterr().out
    assert cli.main(["show", run]) == 0


@every_run
def test_the_support_learns_and_the_rest_never_moves(home: Path, run: str) -> None:
    model, masks = searchpet.load(run).train(), supports(run)
    deltas = {g.key: g.delta.matrix for g in model.searchpet.grafts if g.kind == "matrix"}
    for key, mask in masks.items():
        assert bool((deltas[key] != 0).any()) and not deltas[key][~mask].any()
    before = {key: matrix.detach().clone() for key, matrix in deltas.items()}
    optimizer = torch.optim.AdamW(deltas.values(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        ids = torch.arange(24).view(2, 12)
        model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
    for key, mask in masks.items():
        assert bool((deltas[key] != before[key])[mask].all()) and not deltas[key][~mask].any()


def test_the_removed_model_is_the_masked_one(home: Path) -> None:
    masked, removed = (searchpet.load("flops", remove=remove) for remove in (False, True))
    inputs = {"input_ids": torch.arange(24).view(2, 12)}
    torch.testing.assert_close(outputs(removed, inputs), outputs(masked, inputs), rtol=1e-4,
                               atol=1e-4)
    assert removed.bert.encoder.layer[0].attention.self.query.weight.shape == (24, 32)
    widths = {layer.intermediate.dense.weight.shape[0] for layer in removed.bert.encoder.layer}
    assert len(widths) == 1 and 0 < widths.pop() < 64


@every_run
def test_merging_adds_the_update_up(home: Path, run: str) -> None:
    model = searchpet.load(run)
    inputs = {"input_ids": torch.arange(24).view(2, 12)}
    before = outputs(model, inputs)
    masks = {g.at: g.delta for g in model.searchpet.grafts if g.delta.stage == "weight"}
    if run == "weights":  # the update is masked as well, so the zeros are those asked for
        with pytest.raises(InputError, match="would fill the zeros"):
            searchpet.merge(model)
        searchpet.merge(model, keep_zeros=True)
        total = sum(int(model.get_submodule(path).weight.count_nonzero()) for path in masks)
        assert total == Spec.load(run).keep.used
    else:
        searchpet.merge(model)
        torch.testing.assert_close(outputs(model, inputs), before, rtol=1e-4, atol=1e-5)


@every_run
def test_a_saved_run_loads_to_the_bit(
    home: Path, run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = load_file(Path(run, "delta.safetensors"))
    own = searchpet.load(run).searchpet.tensors()
    assert all(torch.equal(own[name], tensor) for name, tensor in stored.items()
               if not name.startswith("head/"))
    assert cli.main(["evaluate", run, "--json"]) == 0
    score = json.loads(Path(run, "result.json").read_text())["score"]
    assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(score)


@pytest.mark.slow
def test_a_cut_off_search_continues_to_the_same_end(home: Path) -> None:
    words = [*JOB, "--budget", str(LORA + 4 * ENTRIES), *RUNS["flops"], "--out", "cut"]
    for signal, more in (("SIGKILL search 5", []), ("SIGKILL train 3", ["--resume"])):
        assert cut_off([*words, *more], signal, home).returncode == -9
    assert cli.main([*words, "--resume"]) == 0
    for name in ("delta.safetensors", "masks.safetensors"):
        first, again = (load_file(Path(run, name)) for run in ("flops", "cut"))
        assert first.keys() == again.keys()
        assert all(torch.equal(first[key], again[key]) for key in first)
    assert Spec.load("flops").hash == Spec.load("cut").hash


@pytest.mark.parametrize(("words", "message"), [
    (["--budget", str(LORA + 4 * ENTRIES - 1)], "1,104 together, but the budget is 1,103; raise"),
    (["--budget", "5000", "--space", "lora_ranks"], "has none; add --space dsee"),
    (["--budget", "5000", "--set", "dsee.entries=1025"], "at most the 1,024 elements"),
    (["--budget", "5000", "--set", "dsee.entries=0"], "dsee.entries must be at least 1"),
    (["--budget", "5000", "--set", "dsee.rank=32"], r"dsee.rank must be in [1, 31]"),
    (["--budget", "5000", "--set", "dsee.heads=1"], "dsee.heads must be a share"),
    (["--budget", "5000", "--set", "dsee.score=best"], "dsee.score must be one of abs"),
    (["--budget", "5000", "--keep-flops", "35%"], "raise the limit, or dsee.heads"),
    (["--budget", "5000", "--keep-flops", "95%", "--set", "dsee.heads=0.75", "--set",
      "dsee.entries=300"], "at most the 256 elements that are left"),
])
def test_what_cannot_be_asked_is_one_line(
    home: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*JOB, *words, "--out", "wrong"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1

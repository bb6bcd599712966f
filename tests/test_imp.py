"""Iterative magnitude pruning and prune once for all: exact, rewound, resumed, locked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import searchpet
from searchpet import catalog, cli
from searchpet.allocate import rounds
from searchpet.bulk import Bulk
from searchpet.discover import discover
from searchpet.errors import InputError
from searchpet.importance import add_up
from searchpet.masks import filled, regroup
from searchpet.merge import merge
from searchpet.pruning import Prune, keep_of
from searchpet.run import RunFolder
from searchpet.space import Space
from searchpet.spec import Spec
from searchpet.strategies import Problem, Ranking
from searchpet.tickets import linears, magnitudes, refilled
from tests.commands import cut_off, write_task
from tests.laws import families as tiny
from tests.laws.problems import problem

PET = [tiny.rule("lora", "atom", {"rank": 2}), tiny.rule("bias", "channel"),
       tiny.rule("scale", "channel", role="ffn.*")]
UNITS = [tiny.rule("heads", "atom"), tiny.rule("neurons", "atom", {"most": 6, "multiple": 2}),
         tiny.rule("sublayers")]
ELEMENTS = 2 * (4 * 16 * 16 + 2 * 16 * 24)  # of the tiny BERT's matrices in blocks
Gates = dict[str, Tensor]


class Killed(Exception):
    """Stands for kill -9."""


def weighed(share: float, steps: int = 12, **more: Any) -> tuple[Problem, Bulk]:
    """A problem with masks of single weights on every matrix."""
    model = tiny.model("bert")
    space = Space("test", discover(model), [*PET, tiny.rule("weights", "atom")])
    given = problem(model, space, 200, steps=steps, **more)
    bulk = Bulk(space, model, share, f"{100 * share:g}%", given.loss, given.generator)
    given.settle_weights = bulk.settle
    return given, bulk


def united(share: str, steps: int = 12, **more: Any) -> Problem:
    """A problem with masks of attention heads, neurons and sublayers."""
    model = tiny.model("bert")
    space = Space("test", discover(model), [*PET, *UNITS])
    given = problem(model, space, 200, steps=steps, **more)
    given.keep = keep_of(Prune("flops", share), model, space)
    return given


def search(name: str, given: Problem, **keywords: Any) -> Ranking:
    found: Ranking = catalog.get("strategies", name)(given, **keywords)
    return found


def watched(given: Problem, bulk: Bulk) -> tuple[list[list[Tensor]], list[Gates]]:
    """What learns, and the gates, before every step of the search that follows."""
    weights, gates = [], []
    loss = given.loss

    def seen(batch: dict[str, Tensor]) -> Tensor:
        weights.append([p.detach().clone() for g in given.net.groups(given.rates)
                        for p in g["params"]])
        gates.append({key: gate.clone() for key, gate in bulk.gates.items()})
        return loss(batch)

    given.loss = seen
    return weights, gates


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def kept(gates: Gates) -> int:
    return sum(int(gate.sum()) for gate in gates.values())


# --- rounds and rewinding ---


@pytest.mark.parametrize("rewind", [0.0, 0.5])
def test_each_round_prunes_its_share_of_what_is_left_and_rewinds(rewind: float) -> None:
    given, bulk = weighed(0.6, steps=12)  # three rounds, so four phases of three steps
    weights, gates = watched(given, bulk)
    ranking = search("imp", given, rewind=rewind, end=0.75)
    for i, share in enumerate([1.0, *rounds(0.6)]):
        assert kept(gates[3 * i]) == pytest.approx(share * ELEMENTS, abs=1)
    assert kept(bulk.gates) == bulk.use().used == bulk.limit == int(0.6 * ELEMENTS)
    for before, after in pairwise(gates):
        assert all(bool((after[key] <= gate).all()) for key, gate in before.items())
    mark = weights[round(3 * rewind)]
    assert all(same(weights[3 * i], mark) for i in (1, 2, 3))
    assert not same(weights[4], mark) and not same(weights[1], weights[0])  # it does learn
    assert 0 < given.limits.parameters(ranking.keep) <= 200


def test_more_rounds_than_steps_still_meet_the_limit() -> None:
    given, bulk = weighed(0.1, steps=2)
    search("imp", given)
    assert kept(bulk.gates) == int(0.1 * ELEMENTS)


def test_the_smallest_trained_weights_go() -> None:
    """With one round and one threshold: what is left are the largest |W + dW|."""
    given, bulk = weighed(0.85, steps=4)
    scores: list[dict[str, Tensor]] = []

    def spied(score: dict[str, Tensor], *args: Any, **keywords: Any) -> Any:
        scores.append(score)
        return bulk.settle(score, *args, **keywords)

    given.settle_weights = spied
    search("imp", given)
    start, trained = (torch.cat([s.flatten() for s in score.values()]) for score in scores)
    gate = torch.cat([gate.flatten() for gate in bulk.gates.values()]).bool()
    assert trained[gate].min() >= trained[~gate].max()
    assert start[gate].min() < start[~gate].max()  # the pretrained weights alone say otherwise


@pytest.mark.parametrize("family", ["bert", "gpt2", "gpt_neox", "llama"])
def test_magnitudes_are_those_of_the_merged_model(family: str) -> None:
    model = tiny.model(family)
    rules = [tiny.rule("lora", "atom", {"rank": 2}), tiny.rule("scale", "channel", form="linear")]
    net = tiny.supernet(model, tiny.space(model, *rules))
    found = magnitudes(net)
    plain = {s.path: model.get_submodule(s.path).weight.detach().clone()
             for s in linears(net.space)}
    model.searchpet = net.grafts
    merge(model)
    for path, size in found.items():
        module = model.get_submodule(path)
        merged = module.weight.T if hasattr(module, "nf") else module.weight
        assert not torch.equal(module.weight, plain[path])
        torch.testing.assert_close(size, merged.abs())


# --- refill and regroup ---


def test_units_are_as_far_from_the_edge_of_their_quota_as_their_place() -> None:
    found = filled(torch.tensor([3, 9, 0, 9]), 2.2, torch.tensor([0.0, 1.0, 0.0, 2.0]))
    assert found.tolist() == [-0.5 / 4, 0.5 / 4, -1.5 / 4, 1.5 / 4]
    assert (filled(torch.tensor([0, 1]), 0.1, torch.zeros(2)) > 0).tolist() == [False, True]
    assert not (filled(torch.zeros(3), 0.0, torch.zeros(3)) > 0).any()


def test_refill_fills_whole_units_as_many_as_the_weights_do() -> None:
    model = tiny.model("bert")
    space = Space("test", discover(model), [*PET, *UNITS])
    generator = torch.Generator().manual_seed(0)
    paths = {s.path: (s.d_out, s.d_in) for s in linears(space)}
    for density in (0.2, 0.5, 0.9):
        single = {path: torch.rand(shape, generator=generator) < density
                  for path, shape in paths.items()}
        score = refilled(space, single, {p: m.double() for p, m in single.items()})
        count = add_up(single, linears(space), space)
        whole = add_up({p: torch.ones(s) for p, s in paths.items()}, linears(space), space)
        for p in (p for p in space.placements if p.neutral == 1):
            units = space.unit[p.start : p.start + p.width]
            if p.width == 1:
                assert score[units] == 1 + count[units] / whole[units]
                continue
            chosen = score[units] > 0
            assert abs(float(whole[units][chosen].sum() - count[units].sum())) < whole[units[0]]
            if chosen.any() and not chosen.all():
                assert count[units][chosen].min() >= count[units][~chosen].max()
        assert not score[~space.prunes].any()


def test_refill_removes_what_has_the_smallest_weights_and_leaves_no_mask() -> None:
    given = united("45%")
    masks = [p for p in given.space.placements if p.kind == "neurons"]
    with torch.no_grad():
        for p in masks:  # two of six groups
            up = p.site.path.replace("output.dense", "intermediate.dense")
            given.net.model.get_submodule(p.site.path).weight[:, : 2 * p.run] *= 1e-3
            given.net.model.get_submodule(up).weight[: 2 * p.run] *= 1e-3
    before = {n: t.clone() for n, t in given.net.model.bert.state_dict().items()}
    ranking = search("imp", given)
    left = [ranking.keep[given.space.unit[p.start : p.start + p.width]] for p in masks]
    assert not any(bool(keep[:2].any()) for keep in left)
    assert given.keep and 0.35 < given.limits.kept(ranking.keep) / given.keep.cost.dense <= 0.45
    after = given.net.model.bert.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(t, after[name]) for name, t in before.items())


def test_regrouped_masks_are_dense_blocks_within_the_weights() -> None:
    given, bulk = weighed(0.3, steps=14)
    plain, untouched = weighed(0.3, steps=14)
    search("imp", given, shape="regroup", parts=2)
    search("imp", plain, shape="weights")
    for key, gate in bulk.gates.items():
        single = untouched.gates[key].bool()
        rows = gate[gate.any(1)]
        assert 1 <= len(rows.unique(dim=0)) <= 2
        assert int(gate.sum()) == regroup(single, 2).area <= int(single.sum())
    assert bulk.use().used <= bulk.limit


# --- prune once for all ---


def test_masks_follow_the_cubic_schedule_and_are_final_before_the_end() -> None:
    given, bulk = weighed(0.2, steps=16)  # final from step 10 on
    _, gates = watched(given, bulk)
    search("prune_ofa", given)
    for step, found in enumerate(gates):
        left = 0.2 + 0.8 * (1 - min(1.0, step / 10)) ** 3
        assert abs(kept(found) - left * ELEMENTS) <= 2  # whole weights, twice rounded down
    assert kept(bulk.gates) == int(0.2 * ELEMENTS)
    for found in gates[10:]:
        assert all(torch.equal(gate, bulk.gates[key]) for key, gate in found.items())
    for gate in bulk.gates.values():  # the same share of each matrix
        assert abs(int(gate.sum()) - 0.2 * gate.numel()) < 1


# --- resuming ---

CASES = [("imp", {"rewind": 0.5}, "weights"), ("imp", {"shape": "regroup"}, "weights"),
         ("imp", {}, "units"), ("prune_ofa", {}, "weights"), ("prune_ofa", {}, "units")]


@pytest.mark.parametrize(("name", "keywords", "sort"), CASES)
def test_an_interrupted_search_continues_to_the_same_bits(
    name: str, keywords: dict[str, Any], sort: str, tmp_path: Path
) -> None:
    def run(folder: RunFolder | None, stop_at: int) -> tuple[Ranking, Gates]:
        more = {"folder": folder, "every": -1.0}
        given, bulk = (weighed(0.5, 8, **more) if sort == "weights"
                       else (united("60%", 8, **more), None))
        given.net.model.train()  # dropout draws numbers as well
        loss, calls = given.loss, iter(range(10**6))

        def fatal(batch: dict[str, Tensor]) -> Tensor:
            if next(calls) == stop_at:
                raise Killed
            return loss(batch)

        given.loss = fatal
        return search(name, given, **keywords), dict(bulk.gates) if bulk else {}

    whole, gates = run(None, -1)
    for number, stop_at in enumerate((1, 3, 6)):
        folder = RunFolder(tmp_path).sub(str(number))
        with pytest.raises(Killed):
            run(folder, stop_at)
        again, resumed = run(folder, -1)
        assert torch.equal(again.score, whole.score) and torch.equal(again.keep, whole.keep)
        assert all(torch.equal(gate, resumed[key]) for key, gate in gates.items())


# --- what cannot be asked ---


@pytest.mark.parametrize(("name", "keywords", "sort", "message"), [
    ("imp", {"each": 1.0}, "weights", r"imp.each must be in \(0, 1\)"),
    ("imp", {"end": 1.0}, "weights", "imp.end must be a share"),
    ("imp", {"rewind": 2.0}, "weights", "imp.rewind must be a share"),
    ("imp", {"parts": 0}, "weights", "imp.parts must be at least 1"),
    ("imp", {"smooth": 1.0}, "weights", "imp.smooth must be in"),
    ("imp", {"shape": "refil"}, "weights", "imp.shape"),
    ("imp", {"shape": "refill"}, "weights", "take --masks prune/structured"),
    ("imp", {"shape": "regroup"}, "units", "take --keep-weights 50% --masks prune/weights"),
    ("imp", {"shape": "weights"}, "units", "take --keep-weights 50% --masks prune/weights"),
    ("imp", {}, "", "imp prunes, but no limit"),
    ("prune_ofa", {}, "", "prune_ofa prunes, but no limit"),
    ("prune_ofa", {"end": 1.0}, "weights", "prune_ofa.end must be a share"),
    ("prune_ofa", {"rounds": 0}, "weights", "prune_ofa.rounds must be at least 1"),
    ("prune_ofa", {"smooth": -0.1}, "weights", "prune_ofa.smooth must be in"),
    ("imp", {"allocation": "best"}, "weights", "allocation"),
    ("prune_ofa", {"allocation": "best"}, "units", "allocation"),
])
def test_what_cannot_be_asked_is_refused_in_one_line(
    name: str, keywords: dict[str, Any], sort: str, message: str
) -> None:
    given = united("60%") if sort == "units" else weighed(0.5)[0]
    if not sort:
        given.settle_weights = None
    with pytest.raises(InputError, match=message) as caught:
        search(name, given, **keywords)
    assert "\n" not in str(caught.value)


# --- the whole path ---

JOB = ["--model", "tiny", "--steps", "8", "--batch-size", "8", "--max-length", "16", "--tau",
       "0.5", "--quiet"]
FILMS = ["search", "--task", "films", "--budget", "2%", "--controls", "0", *JOB]
WEIGHTS = ["--keep-weights", "40%", "--masks", "prune/weights"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Path]:
    """A folder with two tasks, a backbone, and a run of prune_ofa on the first task."""
    folder = tmp_path_factory.mktemp("imp")
    write_task(folder / "films")
    write_task(folder / "pets", rows=36)
    for file in (folder / "pets").glob("*.jsonl"):
        file.write_text(file.read_text().replace("good", "cats").replace("bad", "dogs"))
    (folder / "tiny").symlink_to(tiny_folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("SEARCHPET_DATA", raising=False)
        assert cli.main([*FILMS, "--strategy", "prune_ofa", *WEIGHTS, "--out", "first"]) == 0
        yield folder


def zeros(run: str) -> dict[str, Tensor]:
    """Where the effective weights of a loaded run are 0, by path."""
    model = searchpet.load(run)
    return {g.at: model.get_submodule(g.at).weight.detach() == 0
            for g in model.searchpet.grafts if g.delta.stage == "weight"}


def test_a_mask_found_on_one_task_is_locked_on_another(home: Path) -> None:
    words = ["train", "first", "--task", "pets", *JOB, "--out", "second"]
    assert cli.main(words) == 0
    assert json.loads(Path("second/result.json").read_text())["task"] == "pets"
    first, second = Path("first/masks.safetensors"), Path("second/masks.safetensors")
    assert first.read_bytes() == second.read_bytes()
    deltas = [load_file(Path(run, "delta.safetensors")) for run in ("first", "second")]
    assert deltas[0].keys() == deltas[1].keys()
    assert any(not torch.equal(t, deltas[1][name]) for name, t in deltas[0].items())
    before, after = zeros("first"), zeros("second")
    assert len(before) == 12
    assert all(torch.equal(mask, after[path]) for path, mask in before.items())
    spec = Spec.load("second")
    assert spec.keep
    total = sum(mask.numel() for mask in before.values())
    assert spec.keep.used == spec.keep.limit == total - sum(int(m.sum()) for m in after.values())
    merged = searchpet.merge(searchpet.load("second"), keep_zeros=True)
    for path, mask in before.items():
        assert not merged.get_submodule(path).weight[mask].any()


@pytest.mark.slow
def test_a_cut_off_run_has_the_same_masks_and_refill_is_really_removed(home: Path) -> None:
    words = [*FILMS, "--strategy", "imp", *WEIGHTS]
    assert cli.main([*words, "--out", "whole"]) == 0
    killed = cut_off([*words, "--out", "cut"], "SIGKILL search 5", home)
    assert killed.returncode == -9, killed.stderr
    assert cli.main([*words, "--out", "cut", "--resume"]) == 0
    for name in ("masks.safetensors", "delta.safetensors"):
        assert Path("whole", name).read_bytes() == Path("cut", name).read_bytes()
    assert cli.main([*FILMS, "--strategy", "imp", "--keep-flops", "60%", "--out", "small"]) == 0
    found = json.loads(Path("small/result.json").read_text())
    assert found["removed"]
    assert 0.5 < found["keep"]["used"] / found["keep"]["dense"] <= 0.6
    assert cli.main(["verify", "small"]) == 0

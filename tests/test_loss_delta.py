"""Pruning by trials: never a rise that was not forced, both budgets, the same end after a kill."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from searchpet import catalog, cli
from searchpet.discover import discover
from searchpet.errors import InputError
from searchpet.importance import importance
from searchpet.limits import Limits
from searchpet.pruning import Prune, keep_of
from searchpet.space import Space
from searchpet.spec import Spec
from searchpet.strategies import Problem, Ranking
from searchpet.strategies.loss_delta import groups_of, prune
from tests.commands import cut_off, write_task
from tests.laws import families as tiny
from tests.laws.problems import Cut, Draws, classified, problem

MASKS = tiny.every_mask(neurons={"most": 6, "multiple": 1})
RULES = [tiny.rule("lora", "atom", {"rank": 2}), *MASKS]


def limits_on(model: nn.Module, share: str, rules: list[Any] = RULES) -> Limits:
    space = Space("test", discover(model), rules)
    return Limits(space, 100, keep_of(Prune("weights", share), model, space))


def scores(limits: Limits, seed: int = 0) -> Tensor:
    return torch.rand(len(limits.space), generator=torch.Generator().manual_seed(seed),
                      dtype=torch.float64)


class Worth:
    """A loss that rises by what each removed unit is worth, and counts how often it is asked."""

    def __init__(self, worth: Tensor) -> None:
        self.worth, self.asked = worth, 0

    def __call__(self, keep: Tensor) -> float:
        self.asked += 1
        return 1.0 + float(self.worth[~keep].sum())


# --- what is tried ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5"])
def test_groups_go_from_coarse_to_fine_and_leave_the_lifeline(family: str) -> None:
    limits = limits_on(tiny.model(family), "60%")
    score = scores(limits)
    groups = groups_of(limits, score, 3)
    depth = [0 if g.name.endswith(tuple("0123456789")) and g.name.split()[-2] == "layer" else
             1 if g.name.split()[-1] in ("attention", "cross_attention", "ffn") else 2
             for g in groups]
    assert depth == sorted(depth) and set(depth) == {0, 1, 2}
    vital = set(limits.lifeline(score).tolist())
    every = {i for g in groups for i in g.units.tolist()}
    assert not every & vital and every | vital == set(limits.prune.tolist())
    coarse = {i for g, d in zip(groups, depth, strict=True) if d == 0 for i in g.units.tolist()}
    assert coarse == every
    assert len(groups) == len(groups_of(limits, -score, 3))  # a loop's length is known before


def test_the_least_important_per_cost_comes_first_and_pieces_are_alike() -> None:
    limits = limits_on(tiny.model("bert"), "80%", [
        tiny.rule("lora"), tiny.rule("neurons", "atom", {"most": 6, "multiple": 1})])
    score = scores(limits, 3)
    groups = [g for g in groups_of(limits, score, 3) if "neurons" in g.name]
    assert len(groups) == 6 and all(len(g.units) == 2 for g in groups if len(g.units) > 1)
    means = [float(score[g.units].mean()) for g in groups if len(g.units) == 2]
    assert means == sorted(means)
    for layer in (0, 1):
        own = [score[g.units] for g in sorted(groups, key=lambda g: g.name)
               if f"layer {layer}" in g.name]
        joined = torch.cat(own)
        assert torch.equal(joined, joined.sort().values)


def test_layers_alone_are_tried_once_each() -> None:
    config = transformers.BertConfig(**tiny.TEXT | {"num_hidden_layers": 5})
    model = transformers.BertForSequenceClassification(config)
    limits = limits_on(model, "60%", [tiny.rule("lora"), tiny.rule("layers")])
    groups = groups_of(limits, scores(limits), 4)
    assert len(groups) == 5 and sorted(len(g.units) for g in groups) == [0, 1, 1, 1, 1]


# --- what goes ----------------------------------------------------------------------------------


def test_what_helps_or_does_not_matter_goes_and_every_step_is_monotone() -> None:
    """A harmful layer goes whole; in the other one what does not matter goes piece by piece."""
    limits = limits_on(tiny.model("bert"), "30%")
    space = limits.space
    worth = torch.zeros(len(space), dtype=torch.float64)
    layer = torch.tensor([p.site.layer for p in space.placements])[space.owner]
    neurons = torch.tensor([p.kind == "neurons" for p in space.placements])[space.owner]
    worth[space.prunes & (layer == 0)] = -0.01
    worth[space.prunes & (layer == 1)] = 0.01  # little, and yet a rise
    idle = (space.prunes & (layer == 1) & neurons).nonzero().squeeze(-1)[:4]
    worth[idle] = 0.0
    judge = Worth(worth)
    keep, removed = prune(limits, judge, groups_of(limits, worth, 6), 2, beyond=True)
    assert not keep[space.prunes & (layer == 0)].any() and not keep[idle].any()
    free = [r for r in removed if not r["forced"]]
    assert free[0]["what"] == "encoder layer 0"
    assert {r["what"].rpartition(" ")[0] for r in free[1:]} == {"encoder layer 1 neurons"}
    losses = [1.0, *(r["after"] for r in free)]
    assert [r["before"] for r in free] == losses[:-1]
    assert losses == sorted(losses, reverse=True) and losses[1] < 1.0
    assert removed == json.loads(json.dumps(removed))


@pytest.mark.parametrize("share", ["25%", "45%", "70%", "95%"])
@pytest.mark.parametrize("seed", range(4))
def test_the_limit_is_met_and_what_fits_comes_back(share: str, seed: int) -> None:
    limits = limits_on(tiny.model("bert"), share)
    assert limits.keep
    worth = scores(limits, seed) + 0.01  # everything matters: all of it is forced
    judge, groups = Worth(worth), groups_of(limits, worth, 3)
    keep, removed = prune(limits, judge, groups, 2, beyond=False)
    left = limits.kept(keep)
    assert left <= limits.keep.limit and all(r["forced"] for r in removed)
    assert bool(keep[limits.lifeline(worth)].all()) and bool(keep[~limits.space.prunes].all())
    assert judge.asked <= 3 * (1 + len(groups))
    for unit in (~keep).nonzero().flatten().tolist():
        more = limits.kept(keep.index_fill(0, torch.tensor([unit]), True))
        assert more == left or more > limits.keep.limit


def test_the_cheapest_rise_per_cost_goes_first() -> None:
    """Neurons of layer 1 cost the loss a third of what those of layer 0 do."""
    limits = limits_on(tiny.model("bert"), "90%", [
        tiny.rule("lora"), tiny.rule("neurons", "atom", {"most": 6, "multiple": 1})])
    space = limits.space
    layer = torch.tensor([p.site.layer for p in space.placements])[space.owner]
    worth = torch.where(layer == 0, 0.3, 0.1).double()
    found, _ = prune(limits, Worth(worth), groups_of(limits, -worth, 6), 1, beyond=False)
    gone = ~found & space.prunes
    assert 0 < int(gone.sum()) and bool((layer[gone] == 1).all())


def test_removal_stops_at_the_limit_unless_it_may_go_beyond() -> None:
    limits = limits_on(tiny.model("bert"), "80%")
    idle = Worth(torch.zeros(len(limits.space), dtype=torch.float64))
    groups = groups_of(limits, scores(limits), 4)
    near, _ = prune(limits, idle, groups, 2, beyond=False)
    far, _ = prune(limits, idle, groups, 2, beyond=True)
    assert limits.keep and limits.kept(far) < limits.kept(near) <= limits.keep.limit
    vital = torch.zeros(len(limits.space), dtype=torch.bool)
    vital[limits.lifeline(scores(limits))] = True
    assert torch.equal(far, vital | ~limits.space.prunes)


def test_a_rise_that_is_not_needed_never_happens() -> None:
    """Where the limit can be met without one, everything that matters stays."""
    limits = limits_on(tiny.model("bert"), "80%")
    worth = scores(limits)
    ffn = torch.tensor(["ffn" in p.site.role for p in limits.space.placements])
    first = torch.tensor([p.site.layer == 0 for p in limits.space.placements])
    idle = limits.space.prunes & (ffn & first)[limits.space.owner]
    worth[idle] = 0.0
    keep, removed = prune(limits, Worth(worth), groups_of(limits, worth, 4), 2, beyond=False)
    assert not any(r["forced"] for r in removed) and [r["what"] for r in removed] == [
        "encoder layer 0 ffn"]
    assert torch.equal(~keep, idle)


# --- the search ---------------------------------------------------------------------------------


def asked(share: str = "60%", limit: int = 200, folder: Path | None = None, steps: int = 6,
          ) -> Problem:
    """A problem with dropout, so that randomness is resumed as well."""
    given = classified(RULES, limit, steps=steps, share=share, folder=folder)
    given.importance = lambda name, batches: importance(
        name, given.net, batches, given.loss, given.generator)
    return given


def search(given: Problem, **more: Any) -> Ranking:
    found: Ranking = catalog.get("strategies", "loss_delta")(
        given, **{"batches": 1, "pieces": 2, "rounds": 1, **more})
    return found


def test_it_removes_what_does_not_matter() -> None:
    """Outputs of attention heads and neurons that are scaled to nothing cost nothing."""
    model = tiny.model("bert")
    space = Space("test", discover(model), [
        tiny.rule("lora", "atom"), tiny.rule("heads", "atom"),
        tiny.rule("neurons", "atom", {"most": 4, "multiple": 1})])
    useless = torch.zeros(len(space), dtype=torch.bool)
    with torch.no_grad():
        for p in space.placements:
            if p.neutral == 1:
                weight = model.get_submodule(p.site.path).weight
                weight.mul_(4)
                for c in range(0, p.width, 2):
                    weight[:, c * p.run : (c + 1) * p.run] *= 1e-4
                    useless[space.unit[p.start + c]] = True
    teacher = copy.deepcopy(model)

    def answer(batch: dict[str, Tensor]) -> Tensor:
        return tiny.logits(teacher, batch).argmax(-1)

    given = problem(model, space, 200, steps=20, train=Draws(0, rows=32, label=answer),
                    valid=Draws(1, rows=32, label=answer))
    given.keep = keep_of(Prune("weights", "55%"), model, space)
    given.importance = lambda name, batches: importance(
        name, given.net, batches, given.loss, given.generator)
    found: Ranking = catalog.get("strategies", "loss_delta")(given, pet="random")
    gone = ~found.keep & space.prunes
    assert given.limits.kept(found.keep) <= given.keep.limit
    assert int(gone.sum()) >= 4 and int((gone & useless).sum()) >= 0.75 * int(gone.sum())


@pytest.mark.parametrize("share", ["40%", "75%"])
def test_both_budgets_hold_and_the_notes_tell_the_order(share: str) -> None:
    given = asked(share, 60)
    found = search(given)
    assert given.keep and given.limits.kept(found.keep) <= given.keep.limit
    assert 0 < given.limits.parameters(found.keep) <= 60
    removed = found.notes["removed"]
    forced = [r["forced"] for r in removed]
    assert removed and forced == sorted(forced)  # what is free goes first
    free = [r for r in removed if not r["forced"]]
    assert all(r["after"] <= r["before"] for r in free)
    assert all(a["after"] == b["before"] for a, b in itertools.pairwise(free))


def test_losses_are_those_of_the_validation_batches_without_dropout() -> None:
    """The loss before the first removal is the tuned model's, here the untouched one's."""
    given = asked("60%")
    found = search(given, train=0.0, pet="random")
    with torch.no_grad():
        given.net.model.eval()
        given.net.z = torch.ones(len(given.space))
        plain = float(given.loss(given.valid[0]))
    assert found.notes["removed"][0]["before"] == pytest.approx(plain, rel=1e-6)
    assert given.net.model.training is False


def test_pet_is_searched_from_the_start_again() -> None:
    """The deltas that the trials have tuned are not what the search of PET begins with."""
    given, seen = asked("60%"), []
    catalog.add("strategies", "looks", lambda problem: _look(problem, seen))
    try:
        search(given, pet="looks")
    finally:
        catalog._added.pop(("strategies", "looks"))
    assert seen and all(torch.equal(a, b) for a, b in zip(
        seen, asked("60%").net.grafts.deltas.parameters(), strict=True))


def _look(given: Problem, seen: list[Tensor]) -> Ranking:
    seen += [p.detach().clone() for p in given.net.grafts.deltas.parameters()]
    score = torch.rand(len(given.space), generator=given.generator)
    return Ranking(score, given.limits.fill(score))


@pytest.fixture(scope="module")
def uncut() -> tuple[Ranking, int]:
    """A whole search, and how often it asks for the loss."""
    given = asked()
    count = Cut(given, 0)
    return search(given), count.made


@pytest.mark.parametrize("where", ["training", "trials", "pet"])
def test_a_search_that_was_cut_off_ends_the_same(
    where: str, tmp_path: Path, uncut: tuple[Ranking, int]
) -> None:
    whole, made = uncut
    trials = whole.notes["tried"]
    stop = {"training": 3, "trials": 3 + 1 + trials // 2, "pet": 3 + 1 + trials + 4}[where]
    again = asked(folder=tmp_path)
    Cut(again, stop)
    with pytest.raises(KeyboardInterrupt):
        search(again)
    assert (tmp_path / "search.checkpoint.safetensors").is_file()
    assert (tmp_path / "search-2.checkpoint.safetensors").is_file() == (where == "pet")
    again = asked(folder=tmp_path)
    rest = Cut(again, 0)
    found = search(again)
    assert torch.equal(found.score, whole.score) and torch.equal(found.keep, whole.keep)
    assert found.notes == whole.notes
    assert rest.made <= made - stop + 3  # nothing but the last step was done again


@pytest.mark.slow
def test_the_command_goes_on_after_a_kill_in_each_of_its_loops(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SEARCHPET_DATA", raising=False)
    write_task(tmp_path / "films")
    (tmp_path / "tiny").symlink_to(tiny_folder)
    words = ["search", "--model", "tiny", "--task", "films", "--budget", "2%", "--keep-flops",
             "60%", "--strategy", "loss_delta", "--set", "loss_delta.batches=1", "--set",
             "loss_delta.rounds=1", "--set", "loss_delta.pieces=2", "--steps", "6",
             "--batch-size", "8", "--max-length", "16", "--controls", "0", "--quiet"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes that are killed: the numbers must be the same
    try:
        assert cli.main([*words, "--out", "done"]) == 0
        for signal, resume in (("search 4", []), ("search-2 3", ["--resume"])):
            killed = cut_off([*words, "--out", "cut", *resume], f"SIGKILL {signal}", tmp_path)
            assert killed.returncode == -9, killed.stderr
        assert cli.main([*words, "--out", "cut", "--resume"]) == 0
    finally:
        torch.set_num_threads(threads)
    specs = [Spec.load(run) for run in ("cut", "done")]
    assert specs[0].entries == specs[1].entries
    assert not list(Path("cut").glob("*.checkpoint.safetensors"))
    assert specs[0].keep and specs[0].keep.used <= specs[0].keep.limit


@pytest.mark.parametrize(("given", "message"), [
    ({"train": 1.5}, "loss_delta.train must be a share of the steps"),
    ({"batches": 0}, "loss_delta.batches must be at least 1, but got 0"),
    ({"pieces": 0}, "loss_delta.pieces must be at least 1"),
    ({"rounds": 0}, "loss_delta.rounds must be at least 1"),
    ({"score": "size"}, "score of prune units must be one of"),
    ({"pet": "best"}, "strategy must be one of"),
])
def test_wrong_hyperparameters_are_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        search(asked(), **given)
    assert "\n" not in str(caught.value)


def test_without_a_limit_there_is_nothing_to_prune() -> None:
    model = tiny.model("bert")
    with pytest.raises(InputError, match="no limit on inference"):
        search(problem(model, tiny.space(model, tiny.rule("lora")), 100))

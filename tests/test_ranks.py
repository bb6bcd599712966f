"""Rank pruning: directions of whole matrices are masked, priced as factors, and really removed."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import searchpet
from searchpet import catalog, cli
from searchpet.apply import apply, trained_tensors, write_tensors
from searchpet.cuts import Cut, mask
from searchpet.deltas.ranks import Ranks, directions
from searchpet.discover import discover
from searchpet.errors import InputError
from searchpet.factors import Factored, factored
from searchpet.flops import flops as counted
from searchpet.importance import importance
from searchpet.latency import Table
from searchpet.limits import Limits
from searchpet.merge import merge
from searchpet.pruning import Prune, keep_of
from searchpet.removal import removable, remove
from searchpet.site import Site
from searchpet.space import Space
from searchpet.spec import Spec
from searchpet.strategies import Problem
from tests.commands import cut_off, write_task
from tests.laws import families as tiny
from tests.laws.problems import problem
from tests.test_pruning import FAMILIES, scores, spec_for

RANKS = tiny.rule("ranks", "atom", {"most": 6})  # 16 directions in groups of 3: the last has 1
PET = [tiny.rule("lora", "atom", {"rank": 2}), tiny.rule("scale", "channel")]


def space_on(model: nn.Module) -> Space:
    return Space("test", discover(model), [*PET, RANKS])


def limits_on(model: nn.Module, share: str = "50%", measure: str = "weights",
              limit: int = 10**6) -> Limits:
    space = space_on(model)
    return Limits(space, limit, keep_of(Prune(measure, share), model, space))


def places(limits: Limits) -> list[tuple[Site, Tensor, int]]:
    """Site, units and directions in a group of every mask."""
    space = limits.space
    return [(p.site, space.unit[p.start : p.start + p.width], p.run)
            for p in space.placements if p.kind == "ranks"]


def kept_of(site: Site, keep: Tensor, run: int) -> int:
    """Directions of the kept groups (groups,), counted one by one."""
    return sum(bool(keep[i // run]) for i in range(min(site.d_in, site.d_out)))


# --- the mask -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("d_out", "d_in"), [(12, 20), (20, 12), (16, 16)])
def test_a_mask_leaves_the_kept_directions_of_the_weight(d_out: int, d_in: int) -> None:
    weight = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(0))
    delta = Ranks(Site("m", "ffn.in", 0, "linear", "encoder", d_in, d_out), most=5)
    assert delta.run == -(-min(d_out, d_in) // 5)
    z = torch.rand(delta.width, generator=torch.Generator().manual_seed(1))
    U, s, V = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    gates = z.double().repeat_interleave(delta.run)[: len(s)].numpy()
    found = weight + delta(weight, weight, z)
    np.testing.assert_allclose(found, (U * (s * gates)) @ V, atol=1e-5)
    np.testing.assert_allclose(
        delta.energies(), np.add.reduceat(s**2, range(0, len(s), delta.run)), rtol=1e-5)


def test_directions_are_the_same_every_time_and_their_signs_are_fixed() -> None:
    weight = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    U, s, V = directions(weight)
    for other in (weight.clone(), weight.T.contiguous().T):
        assert all(torch.equal(a, b) for a, b in zip((U, s, V), directions(other), strict=True))
    assert bool((U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all())
    torch.testing.assert_close((U * s) @ V, weight.double())


def test_the_directions_are_those_of_the_weight_that_was_seen_first() -> None:
    first, second = (torch.randn(8, 8, generator=torch.Generator().manual_seed(i))
                     for i in range(2))
    delta = Ranks(Site("m", "ffn.in", 0, "linear", "encoder", 8, 8))
    delta(first, first, torch.ones(8))
    assert delta.basis is not None
    before = delta.basis.clone()
    delta(second, second, torch.zeros(8))
    assert torch.equal(delta.basis, before)


@pytest.mark.parametrize("family", ["bert", "gpt2", "gpt_neox"])
def test_open_gates_change_no_bit(family: str) -> None:
    model, batch = tiny.model(family), tiny.inputs(family)
    before = tiny.logits(model, batch)
    net = tiny.supernet(model, Space("test", discover(model), [RANKS]))
    assert torch.equal(tiny.logits(model, batch), before)
    net.z = torch.zeros(len(net.space))
    assert not torch.allclose(tiny.logits(model, batch), before)
    net.remove()
    assert torch.equal(tiny.logits(model, batch), before)


# --- the price ----------------------------------------------------------------------------------


def test_a_matrix_costs_its_factors_or_itself_whichever_is_less() -> None:
    limits = limits_on(tiny.model("bert"))
    assert limits.keep
    # a block of BERT: q, k, v, o of 16 x 16, the feed-forward's 16 x 24 and 24 x 16
    assert limits.keep.cost.dense == 2 * (4 * 16 * 16 + 2 * 16 * 24)
    assert limits.keep.limit == limits.keep.cost.dense // 2
    assert limits.keep.cost.floor == 0
    for seed in range(20):
        z = tiny.some(len(limits.space), seed, share=(seed + 1) / 22)
        expected = sum(
            min(site.d_in * site.d_out, kept_of(site, z[units], run) * (site.d_in + site.d_out))
            for site, units, run in places(limits))
        assert float(limits.keep.cost.at(z.double())) == expected


@pytest.mark.parametrize(("measure", "share"), [
    ("weights", "30%"), ("weights", "50%"), ("weights", "90%"), ("flops", "65%")])
def test_what_is_kept_is_within_the_limit_and_whole_matrices_stay_whole(
    measure: str, share: str
) -> None:
    limits = limits_on(tiny.model("bert"), share, measure)
    assert limits.keep
    whole = 0
    for seed in range(10):
        keep = limits.fill(scores(limits, seed))
        assert limits.kept(keep) <= limits.keep.limit
        for site, units, run in places(limits):
            factors = kept_of(site, keep[units], run) * (site.d_in + site.d_out)
            whole += bool(keep[units].all())
            assert bool(keep[units].all()) or factors < site.d_in * site.d_out
    assert whole or share != "90%"


def test_both_budgets_hold_in_expectation() -> None:
    limits = limits_on(tiny.model("bert"), "40%", limit=100)
    assert limits.keep
    alpha = torch.randn(len(limits.space), generator=torch.Generator().manual_seed(0),
                        dtype=torch.float64, requires_grad=True)
    p = limits.shift(alpha)
    gates = torch.where(limits.space.prunes, p.detach(), 1.0)
    assert float(limits.keep.cost.at(gates)) == pytest.approx(limits.keep.limit, rel=1e-6)
    assert float((p * limits.price(p)).detach().sum()) == pytest.approx(100, rel=1e-6)
    (slope,) = torch.autograd.grad(p[limits.prune[:3]].sum(), alpha)
    assert bool((slope[limits.prune] != 0).any())


def test_a_direction_has_a_price_even_where_the_matrix_is_whole() -> None:
    limits = limits_on(tiny.model("bert"))
    assert limits.keep
    z = torch.ones(len(limits.space), dtype=torch.float64, requires_grad=True)
    (price,) = torch.autograd.grad(limits.keep.cost.at(z), z)
    for site, units, run in places(limits):
        assert price[units[0]] == run * (site.d_in + site.d_out)
    assert not price[~limits.space.prunes].any()


# --- removal ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", ["80%", "90%"])
def test_masked_and_removed_models_are_one_function_of_the_price(
    family: str, share: str
) -> None:
    masked, removed = tiny.model(family), tiny.model(family)
    limits = limits_on(masked, share, "flops")
    keep = limits.fill(scores(limits, 0))
    spec = spec_for(masked, limits, keep)
    dense = elements(removed)
    for model, out in ((masked, False), (removed, True)):
        apply(model, spec, remove=out)
    tiny.perturb(masked.searchpet.deltas.parameters(), 0.3, 0)
    write_tensors(removed, tiny.head_of(removed),
                  trained_tensors(masked, tiny.head_of(masked)), "test")
    batch = tiny.inputs(family)
    torch.testing.assert_close(tiny.logits(removed, batch), tiny.logits(masked, batch),
                               rtol=1e-4, atol=1e-4)
    assert any(isinstance(m, Factored) for m in removed.modules())
    removed.searchpet.detach()
    del removed.searchpet
    assert sum(counted(removed).values()) == pytest.approx(limits.kept(keep), rel=1e-9)
    assert elements(removed) < dense


def elements(model: nn.Module) -> int:
    """Of the blocks' matrices."""
    paths = {site.path for site in discover(model) if site.form == "linear"}
    return sum(model.get_submodule(path).get_parameter("weight").numel() for path in paths)


def test_two_smaller_matrices_stand_in_place_with_the_bias_behind_them() -> None:
    linear = nn.Linear(12, 20)
    site = Site("m", "ffn.in", 0, "linear", "encoder", 12, 20)
    made = factored(linear, [site], {"ffn.in": (0, 2, 5)})
    assert made.weight.numel() == 3 * (12 + 20) and made.bias is linear.bias
    U, s, V = np.linalg.svd(linear.weight.detach().double().numpy(), full_matrices=False)
    left = torch.from_numpy((U[:, [0, 2, 5]] * s[[0, 2, 5]]) @ V[[0, 2, 5]]).float()
    x = torch.randn(2, 3, 12)
    torch.testing.assert_close(made(x), nn.functional.linear(x, left, linear.bias))
    nothing = factored(linear, [site], {"ffn.in": ()})
    torch.testing.assert_close(nothing(x), linear.bias.expand(2, 3, 20))
    most = factored(linear, [site], {"ffn.in": tuple(range(11))})  # factors would be larger
    assert most.weight.numel() == 12 * 20


def test_parts_of_a_fused_matrix_lose_directions_of_their_own() -> None:
    model = tiny.model("gpt_neox")  # stored head by head: [q k v] [q k v]
    batch = tiny.inputs("gpt_neox")
    site = next(s for s in discover(model) if s.role == "attention.key")
    assert site.index and len(site.index) == 2
    cut = Cut(ranks={(site.path, site.role): (0, 1, 2)})
    hooks = mask(model, cut)
    expected = tiny.logits(model, batch)
    hooks.remove()
    remove(model, cut)
    made = model.get_submodule(site.path)
    assert isinstance(made, Factored)
    assert sorted(str(part.rank) for part in made.parts) == ["3", "None", "None"]
    torch.testing.assert_close(tiny.logits(model, batch), expected)


def test_what_fails_leaves_the_model_as_it_was() -> None:
    model = tiny.model("bert")
    query = next(s for s in discover(model) if s.role == "attention.query")
    with pytest.raises(InputError, match="must ascend within 0..15"):
        remove(model, Cut(ranks={(query.path, query.role): (3, 3)}))
    with pytest.raises(InputError, match="did you mean"):
        remove(model, Cut(ranks={(query.path, "attention.quer"): (3,)}))
    block = query.path.removesuffix(".self.query") + ".output.dense"
    with pytest.raises(InputError, match="nothing else out"):
        remove(model, Cut(heads={block: (0,)}, ranks={(query.path, query.role): (3,)}))
    cut = Cut(ranks={(query.path, query.role): (0,)})
    assert removable(model, cut) is None and type(model.get_submodule(query.path)) is nn.Linear
    remove(model, cut)
    with pytest.raises(InputError, match="must be cut from plain linears"):
        remove(model, cut)  # it is two matrices by now


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_masked_model_merges_and_a_factored_one_is_refused(family: str) -> None:
    model, removed = tiny.model(family), tiny.model(family)
    limits = limits_on(model)
    spec = spec_for(model, limits, limits.fill(scores(limits, 1)))
    apply(model, spec)
    apply(removed, spec, remove=True)
    tiny.perturb(model.searchpet.deltas.parameters(), 0.2, 1)
    batch = tiny.inputs(family)
    before, untouched = tiny.logits(model, batch), tiny.logits(removed, batch)
    merge(model)
    torch.testing.assert_close(tiny.logits(model, batch), before, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="is two factors; load the run with remove=False"):
        merge(removed)
    assert torch.equal(tiny.logits(removed, batch), untouched)


# --- scores and strategies ----------------------------------------------------------------------


def asked(model: nn.Module, *, share: str = "50%", limit: int = 150, steps: int = 8,
          rules: Any = (*PET, RANKS)) -> Problem:
    space = Space("test", discover(model), rules)
    given = problem(model, space, limit, steps=steps)
    given.keep = keep_of(Prune("weights", share), model, space)
    given.importance = partial(_importance, given)
    return given


def _importance(given: Problem, name: str, batches: Any) -> Tensor:
    return importance(name, given.net, batches, given.loss, given.generator)


def test_the_gate_score_is_the_slope_along_a_direction() -> None:
    model = tiny.model("bert")
    given = asked(model, rules=[*PET, tiny.rule("ranks", "atom", {"most": 16})])
    batch = given.train[0]
    score = given.importance("gate", [batch])
    site, units, _ = next(p for p in places(given.limits) if p[0].role == "ffn.out")
    given.net.remove()
    linear = model.get_submodule(site.path)
    linear.weight.requires_grad_()
    (G,) = torch.autograd.grad(given.loss(batch), linear.weight)
    U, s, V = (torch.from_numpy(t) for t in np.linalg.svd(
        linear.weight.detach().double().numpy(), full_matrices=False))
    expected = (s * torch.einsum("or,oi,ri->r", U, G.double(), V)).abs()
    torch.testing.assert_close(score[units], expected, rtol=1e-3, atol=1e-6)


def deaf(model: nn.Module) -> dict[str, Tensor]:
    """Give every ffn.out its largest singular value on a neuron that is always 0."""
    found = {}
    with torch.no_grad():
        for site in discover(model):
            linear = model.get_submodule(site.path)
            if site.role == "ffn.in":
                linear.weight[0], linear.bias[0] = 0.0, 0.0
            elif site.role == "ffn.out":
                linear.weight[1], linear.weight[:, 0] = 0.0, 0.0
                linear.weight[1, 0] = 50.0
                found[site.path] = linear.weight
    return found


@pytest.mark.parametrize("score", ["gate", "energy"])
def test_gradients_tell_what_no_input_reaches_and_energy_does_not(score: str) -> None:
    model = tiny.model("bert")
    assert len(deaf(model)) == 2
    given = asked(model, share="40%",
                  rules=[*PET, tiny.rule("ranks", "atom", {"most": 16})])
    ranking = catalog.get("strategies", "rank_prune")(given, score=score, pet="random")
    given.net.remove()
    largest = [units[0] for site, units, _ in places(given.limits) if site.role == "ffn.out"]
    assert [bool(ranking.keep[i]) for i in largest] == [score == "energy"] * 2


@pytest.mark.parametrize("name", ["rank_prune", "bilevel", "apt", "random"])
def test_strategies_obey_both_budgets_and_their_seed(name: str) -> None:
    found = []
    for _ in range(2):
        model = tiny.model("bert")
        given = asked(model)
        assert given.keep
        ranking = catalog.get("strategies", name)(given)
        given.net.remove()
        assert 0 < given.limits.parameters(ranking.keep) <= 150
        assert 0.4 < given.limits.kept(ranking.keep) / given.keep.cost.dense <= 0.5
        fresh = tiny.model("bert").bert.state_dict()
        assert all(torch.equal(t, fresh[n]) for n, t in model.bert.state_dict().items())
        found.append(ranking.keep)
    assert torch.equal(*found)


def test_a_search_over_gates_finds_the_directions_that_matter() -> None:
    """bilevel keeps those few directions that a matrix of low rank has."""
    model = tiny.model("bert")
    with torch.no_grad():
        for site in discover(model):
            if site.form == "linear":
                linear = model.get_submodule(site.path)
                U, s, V = torch.linalg.svd(4 * linear.weight, full_matrices=False)
                linear.weight.copy_((U[:, :4] * s[:4]) @ V[:4] + 1e-3 * linear.weight)
    teacher = copy.deepcopy(model)
    given = asked(model, share="40%", limit=200, steps=60,
                  rules=[*PET, tiny.rule("ranks", "atom", {"most": 8})])
    own = given.loss
    given.loss = lambda b: own({**b, "labels": tiny.logits(
        teacher, {k: v for k, v in b.items() if k != "labels"}).argmax(-1)})
    ranking = catalog.get("strategies", "bilevel")(given)
    given.net.remove()
    first = torch.stack([ranking.keep[units[:2]].double().mean()
                         for _, units, _ in places(given.limits)]).mean()
    rest = torch.stack([ranking.keep[units[2:]].double().mean()
                        for _, units, _ in places(given.limits)]).mean()
    assert float(first) > 2 * float(rest)


def test_what_does_not_go_together_is_refused() -> None:
    model = tiny.model("bert")
    space = Space("test", discover(model), [*PET, RANKS, tiny.rule("heads", "atom")])
    with pytest.raises(InputError, match="must be the only masks of units"):
        keep_of(Prune("weights", "50%"), model, space)
    table = Table(attention=5.0, ffn=7.0, head_feature=2.0, neuron=3.0)
    with pytest.raises(InputError, match="cannot remove, 100%"):
        keep_of(Prune("latency", "50%"), model, space_on(model), table)
    given = asked(model)
    with pytest.raises(InputError, match="adds up weights, but ranks are none"):
        given.importance("wanda", [given.train[0]])
    given.net.remove()
    heads = asked(tiny.model("bert"), share="90%", rules=[*PET, tiny.rule("heads", "atom")])
    with pytest.raises(InputError, match="energy is of ranks, but there are masks of heads"):
        heads.importance("energy", [])
    with pytest.raises(InputError, match="rank_prune.batches must be at least 1"):
        catalog.get("strategies", "rank_prune")(heads, batches=0)


# --- the command line ---------------------------------------------------------------------------

JOB = ["search", "--model", "tiny", "--task", "films", "--budget", "2%", "--strategy",
       "rank_prune", "--keep-weights", "50%", "--steps", "6", "--batch-size", "8",
       "--max-length", "16", "--tau", "0.5", "--controls", "0", "--quiet"]


def test_a_run_verifies_loads_smaller_and_survives_a_kill(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SEARCHPET_DATA", raising=False)
    write_task(tmp_path / "films")
    (tmp_path / "tiny").symlink_to(tiny_folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the process that is killed: the numbers must be the same
    try:
        assert cli.main([*JOB, "--out", "done"]) == 0
        killed = cut_off([*JOB, "--out", "cut"], "SIGKILL search 4", tmp_path)
        assert killed.returncode == -9, killed.stderr
        assert cli.main([*JOB, "--out", "cut", "--resume"]) == 0
    finally:
        torch.set_num_threads(threads)
    assert Path("cut/delta.safetensors").read_bytes() == Path(
        "done/delta.safetensors").read_bytes()
    spec, result = Spec.load("done"), json.loads(Path("done/result.json").read_text())
    assert spec.entries == Spec.load("cut").entries
    assert spec.keep and result["removed"]
    assert spec.keep.dense == 2 * (4 * 32 * 32 + 2 * 32 * 64)
    assert 0.45 * spec.keep.dense < spec.keep.used <= spec.keep.limit == spec.keep.dense / 2
    assert elements(searchpet.load("done")) == spec.keep.used
    capsys.readouterr()
    assert cli.main(["verify", "done"]) == 0
    said = capsys.readouterr().out
    assert "weights that are left" in said and "WRONG" not in said
    assert cli.main(["show", "done"]) == 0
    assert "ranks" in capsys.readouterr().out
    assert cli.main(["evaluate", "done", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(result["score"])

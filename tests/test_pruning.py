"""Prune masks in a space, what they cost, and that masked and removed models are one function."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from searchpet import catalog
from searchpet.apply import apply, trained_tensors, write_tensors
from searchpet.ask import Ask
from searchpet.backbone import config_hash
from searchpet.discover import discover
from searchpet.errors import InputError
from searchpet.flops import flops as counted
from searchpet.hosts import Hosts, Mask
from searchpet.importance import importance
from searchpet.latency import Table, measure
from searchpet.limits import Keep, Limits
from searchpet.merge import merge
from searchpet.pruning import Prune, asked, keep_of
from searchpet.space import Space
from searchpet.spec import BackboneId, BudgetUse, KeepUse, Spec
from searchpet.strategies import Problem
from searchpet.supernet import Supernet
from tests.laws import families as tiny
from tests.laws.problems import Draws, problem

MASKS = tiny.every_mask(neurons={"most": 6, "multiple": 2})
PET = [tiny.rule("lora", "atom", {"rank": 2}), tiny.rule("bias", "channel"),
       tiny.rule("scale", "module"), tiny.rule("adapter", "atom", {"bottleneck": 2})]


def limits_on(model: nn.Module, share: str = "60%", limit: int = 10**6,
              measure: str = "flops") -> Limits:
    space = Space("test", discover(model), [*PET, *MASKS])
    return Limits(space, limit, keep_of(Prune(measure, share), model, space))


def spec_for(model: nn.Module, limits: Limits, keep: torch.Tensor) -> Spec:
    used = limits.parameters(keep)
    assert limits.keep
    count = sum(p.numel() for p in model.parameters())
    return Spec(
        backbone=BackboneId(name="tiny", revision=None, config_hash=config_hash(model.config),
                            parameters=count),
        entries=limits.entries(keep),
        budget=BudgetUse(text=str(used), limit=used, used=used, slack=0, denominator=count),
        keep=KeepUse(measure=limits.keep.measure, text=limits.keep.text, limit=limits.keep.limit,
                     used=limits.kept(keep), dense=limits.keep.cost.dense),
        plan=limits.plan(keep))


def scores(limits: Limits, seed: int) -> torch.Tensor:
    return torch.rand(len(limits.space), generator=torch.Generator().manual_seed(seed))


FAMILIES = ["bert", "llama", "gpt2", "gpt_neox", "qwen3", "t5", "vit"]
every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
@pytest.mark.parametrize("seed", range(3))
def test_masked_and_removed_models_are_one_function(family: str, seed: int) -> None:
    masked, removed = tiny.model(family), tiny.model(family)
    limits = limits_on(masked)
    spec = spec_for(masked, limits, limits.fill(scores(limits, seed)))
    for model, remove in ((masked, False), (removed, True)):
        apply(model, spec, remove=remove)
    tiny.perturb(masked.searchpet.deltas.parameters(), 0.3, seed)
    tensors = trained_tensors(masked, tiny.head_of(masked))
    write_tensors(removed, tiny.head_of(removed), tensors, "test")
    batch = tiny.inputs(family)
    torch.testing.assert_close(tiny.logits(removed, batch), tiny.logits(masked, batch),
                               rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in removed.parameters()) < sum(
        p.numel() for p in masked.parameters())


@every_family
@pytest.mark.parametrize("remove", [False, True])
def test_a_pruned_model_merges(family: str, remove: bool) -> None:
    model = tiny.model(family)
    biased = family not in ("llama", "qwen3", "t5")
    rules = [tiny.rule("lora", "atom", {"rank": 2}), tiny.rule("scale", "channel"),
             *([tiny.rule("bias", "channel")] if biased else []),
             *(rule for rule in MASKS if rule.kind != "layers")]
    space = Space("test", discover(model), rules)
    limits = Limits(space, 10**6, keep_of(Prune("flops", "60%"), model, space))
    apply(model, spec_for(model, limits, limits.fill(scores(limits, 1))), remove=remove)
    tiny.perturb(model.searchpet.deltas.parameters(), 0.2, 1)
    batch = tiny.inputs(family)
    before = tiny.logits(model, batch)
    merge(model)
    torch.testing.assert_close(tiny.logits(model, batch), before, rtol=1e-4, atol=1e-4)


@every_family
def test_the_price_of_a_structure_is_what_is_built_and_counted(family: str) -> None:
    model = tiny.model(family)
    limits = limits_on(model)
    assert limits.keep
    dense = sum(counted(model).values())
    assert limits.keep.cost.dense == dense
    keep = limits.fill(scores(limits, 7))
    spec = spec_for(model, limits, keep)
    apply(model, spec, remove=True)
    assert sum(p.numel() for p in model.searchpet.deltas.parameters()) == limits.parameters(keep)
    model.searchpet.detach()
    del model.searchpet
    assert sum(counted(model).values()) == pytest.approx(limits.kept(keep), rel=1e-9)
    assert limits.kept(keep) <= limits.keep.limit <= 0.6 * dense


@pytest.mark.parametrize("share", ["30%", "60%", "95%"])
@pytest.mark.parametrize("limit", [40, 400, 4000])
def test_both_budgets_hold_in_expectation_and_in_the_choice(share: str, limit: int) -> None:
    limits = limits_on(tiny.model("bert"), share, limit)
    assert limits.keep
    for seed in range(5):
        alpha = 3 * torch.randn(len(limits.space),
                                generator=torch.Generator().manual_seed(seed)).double()
        p = limits.shift(alpha)
        gates = torch.where(limits.space.prunes, p, 1.0)
        assert float(limits.keep.cost.at(gates)) == pytest.approx(limits.keep.limit, rel=1e-6)
        price = limits.price(p)
        total = float(price.sum())
        assert float((p * price).sum()) == pytest.approx(min(limit, total), rel=1e-6)
        keep = limits.fill(p)
        assert limits.kept(keep) <= limits.keep.limit
        assert limits.parameters(keep) <= limit


@every_family
@pytest.mark.parametrize("share", ["40%", "60%", "80%"])
def test_nothing_that_fits_is_left_out(family: str, share: str) -> None:
    """A closed sublayer can be opened for one of its units: that must not fit any more."""
    limits = limits_on(tiny.model(family), share)
    assert limits.keep
    assert limits.hosts
    space = limits.space
    leaves = [p for p in space.placements if p.kind in ("heads", "neurons")]
    for seed in range(3):
        keep = limits.fill(scores(limits, seed))
        for p in leaves:
            above = list(limits.hosts.ties(p.site).above)
            units = space.unit[p.start : p.start + p.width]
            alive = bool(keep[above].all())
            for unit in units.tolist():
                more = keep.clone()
                if not alive:
                    more[units] = False  # what a closed gate hides counts for nothing
                more[[unit, *above]] = True
                assert limits.kept(more) > limits.keep.limit or (alive and keep[unit])


def test_a_unit_goes_with_the_worst_of_what_it_hangs_on() -> None:
    limits = limits_on(tiny.model("bert"), "60%")
    score = torch.ones(len(limits.space))
    sublayers = [p for p in limits.space.placements if p.kind == "sublayers"]
    score[limits.space.unit[sublayers[1].start]] = 0.0  # the feed-forward of layer 0
    keep = limits.fill(score)
    inside = [limits.space.unit[p.start : p.start + p.width] for p in limits.space.placements
              if p.kind == "neurons"]
    assert not keep[inside[0]].any()  # its own score is 1, that of its sublayer 0
    assert keep[inside[1]].any()
    assert limits.keep
    assert limits.kept(keep) > 0.55 * limits.keep.cost.dense


@pytest.mark.parametrize(("family", "size"), [("qwen3", 8), ("olmo2", 16)])
def test_norms_of_queries_and_keys_go_with_the_attention(family: str, size: int) -> None:
    """Olmo 2 has one norm over all heads, which shrinks; Qwen 3 one of a head's size."""
    config = transformers.AutoConfig.for_model(family, **tiny.CONFIGS["qwen3"])
    sites = discover(transformers.AutoModelForCausalLM.from_config(config))
    heads = next(s for s in sites if s.role == "attention.output")
    block = next(s for s in sites if s.role == "attention.block" and s.layer == heads.layer)
    run = heads.d_in // 2
    hosts = Hosts(sites, [Mask(heads, torch.tensor([0, 1]), run),
                          Mask(block, torch.tensor([2]), block.d_out)])
    norms = [s for s in sites if s.role in ("norm.query", "norm.key") and s.layer == heads.layer]
    assert [norm.d_out for norm in norms] == [size, size]
    for norm in norms:
        found = hosts.live(norm, torch.tensor([True, False, True]))
        assert found is not None and found.site.d_out == 8
        assert hosts.live(norm, torch.tensor([True, True, False])) is None  # the sublayer is gone
        assert hosts.live(norm, torch.tensor([False, False, True])) is None  # all heads are


def test_the_gradient_of_both_shifts_is_the_difference_quotient() -> None:
    limits = limits_on(tiny.model("bert"), "50%", 300)
    generator = torch.Generator().manual_seed(0)
    alpha = torch.randn(len(limits.space), generator=generator).double().requires_grad_()
    direction = torch.randn(len(limits.space), generator=generator).double()
    # of the PET units' price alone the gradient is left out, so their part is held apart
    prune = limits.space.prunes.double()
    (found,) = torch.autograd.grad((limits.shift(alpha) * direction * prune).sum(), alpha)
    for i in limits.prune[:6].tolist():
        step = torch.zeros_like(alpha)
        step[i] = 1e-5
        above, below = ((limits.shift(alpha.detach() + s) * direction * prune).sum()
                        for s in (step, -step))
        assert float(found[i]) == pytest.approx(float(above - below) / 2e-5, rel=1e-4, abs=1e-7)


def test_pet_on_a_half_removed_host_costs_half() -> None:
    model = tiny.model("bert")
    space = Space("test", discover(model), [
        tiny.rule("lora", "atom", role="attention.query"), tiny.rule("bias", "channel"),
        tiny.rule("heads", "atom")])
    limits = Limits(space, 10**6, keep_of(Prune("weights", "90%"), model, space))
    z = torch.ones(len(space))
    assert torch.equal(limits.price(z).long(), space.cost)
    first = next(p for p in space.placements if p.kind == "heads")
    z[space.unit[first.start]] = 0
    by_kind = {p.kind: limits.price(z)[space.unit[p.start : p.start + p.width]]
               for p in space.placements if p.site.role == "attention.query"
               and p.site.layer == first.site.layer}
    assert by_kind["lora"].tolist() == [16 + 8]
    assert by_kind["bias"].tolist() == [0.0] * 8 + [1.0] * 8
    z[space.unit[first.start : first.start + first.width]] = 0  # nothing left to mix
    dead = [p for p in space.placements if p.site.role.startswith("attention")
            and p.site.layer == first.site.layer and p.kind != "heads"]
    assert dead and all(not limits.price(z)[space.unit[p.start : p.start + p.width]].any()
                        for p in dead)


@pytest.mark.parametrize("how", [{}, {"prior": 0.0, "pace": 1.0}], ids=["default", "learned"])
def test_a_search_with_masks_finds_what_does_not_matter(how: dict[str, float]) -> None:
    """bilevel removes the neurons and attention heads whose outputs are scaled to nothing, also
    where it does not start from their importance.
    """
    found = [_gone(seed, how) for seed in range(3)]
    assert all(gone >= 4 for _, gone in found)
    assert sum(right for right, _ in found) >= 0.75 * sum(gone for _, gone in found)


def _gone(seed: int, how: dict[str, float]) -> tuple[int, int]:
    """Useless units among those that went, and all that went."""
    model = tiny.model("bert")
    space = Space("test", discover(model), [
        tiny.rule("lora", "atom"), *tiny.every_mask(neurons={"most": 4, "multiple": 1})[:1],
        tiny.rule("neurons", "atom", {"most": 4, "multiple": 1})])
    useless = {}
    with torch.no_grad():
        for p in space.placements:
            if p.neutral == 1:
                weight = model.get_submodule(p.site.path).weight
                weight.mul_(4)
                for c in range(0, p.width, 2):
                    weight[:, c * p.run : (c + 1) * p.run] *= 1e-4
                    useless[int(space.unit[p.start + c])] = True
    keep = keep_of(Prune("weights", "55%"), model, space)
    teacher = copy.deepcopy(model)

    def answer(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return tiny.logits(teacher, batch).argmax(-1)

    given = problem(model, space, 200, steps=100, seed=seed,
                    train=Draws(seed, rows=32, label=answer),
                    valid=Draws(seed + 10, rows=32, label=answer))
    given.keep = keep
    given.importance = partial(_importance, given)
    ranking = catalog.get("strategies", "bilevel")(given, **how)
    given.net.remove()
    gone = [i for i in given.limits.prune.tolist() if not ranking.keep[i]]
    assert given.limits.kept(ranking.keep) <= keep.limit
    return sum(i in useless for i in gone), len(gone)


@pytest.mark.parametrize("name", [
    n for n in catalog.names("strategies") if n not in ("dsee", "s3pet", "sparse_adapter")])
def test_every_strategy_obeys_both_budgets_and_its_seed(name: str) -> None:
    found = []
    for _ in range(2):
        model = tiny.model("bert")
        space = Space("test", discover(model), [*PET, *MASKS])
        given = problem(model, space, 300, steps=12)
        given.keep = keep_of(Prune("flops", "50%"), model, space)
        given.importance = partial(_importance, given)
        ranking = catalog.get("strategies", name)(given)
        assert 0 < given.limits.parameters(ranking.keep) <= 300
        assert 0.2 < given.limits.kept(ranking.keep) / given.keep.cost.dense <= 0.5
        given.net.remove()
        fresh = tiny.model("bert").bert.state_dict()
        assert all(torch.equal(t, fresh[n]) for n, t in model.bert.state_dict().items())
        found.append(ranking.keep)
    assert torch.equal(*found)


def _importance(given: Problem, name: str, batches: Any) -> torch.Tensor:
    return importance(name, given.net, batches, given.loss, given.generator)


@pytest.mark.parametrize(("variant", "left"), [
    ("top", [0, 1, 2]), ("bottom", [3, 4, 5]), ("alternate", [0, 2, 4]), ("symmetric", [0, 1, 5])])
def test_layers_drop_by_their_place(variant: str, left: list[int]) -> None:
    config = transformers.BertConfig(**tiny.TEXT | {"num_hidden_layers": 6})
    model = transformers.BertForSequenceClassification(config)
    space = Space("test", discover(model), [tiny.rule("lora"), tiny.rule("layers")])
    given = problem(model, space, 100, steps=2)
    given.keep = keep_of(Prune("flops", "50%"), model, space)
    given.importance = partial(_importance, given)
    ranking = catalog.get("strategies", "layer_drop")(given, variant=variant, pet="random")
    kept = [p.site.layer for p in space.placements
            if p.kind == "layers" and bool(ranking.keep[space.unit[p.start]])]
    assert kept == left


@pytest.mark.parametrize("name", ["fisher", "gate", "snip"])
def test_a_score_tells_what_does_not_matter(name: str) -> None:
    """Heads and neurons whose outputs are scaled to nothing score lowest where the loss is asked.

    Scores of weights alone still see the rows before the output, which are as they were.
    """
    model = tiny.model("bert")
    space = Space("test", discover(model), [
        tiny.rule("lora", "atom"), tiny.rule("heads", "atom"),
        tiny.rule("neurons", "atom", {"most": 4, "multiple": 1})])
    useless = torch.zeros(len(space), dtype=torch.bool)
    mixing = {p.site.path: model.get_submodule(p.site.path).weight
              for p in space.placements if p.neutral == 1}
    with torch.no_grad():
        for p in space.placements:
            if p.neutral == 1:
                mixing[p.site.path][:, : p.run] *= 1e-3
                useless[space.unit[p.start]] = True
    given = problem(model, space, 300)
    given.keep = keep_of(Prune("weights", "70%"), model, space)
    score = _importance(given, name, [given.train[i] for i in range(4)])
    for p in space.placements:
        if p.neutral == 1:
            units = space.unit[p.start : p.start + p.width]
            lowest = units[score[units].argmin()]
            assert bool(useless[lowest])
    assert not score[~space.prunes].any()


@pytest.mark.parametrize("family", ["bert", "gpt2", "gpt_neox"])  # linears apart, turned, fused
def test_low_rank_scores_units_by_the_factors_of_lora(family: str) -> None:
    """Of a head: its columns of the attention's output, and its rows of query, key and value."""
    model = tiny.model(family)
    space = tiny.space(model, tiny.rule("lora", "atom", {"rank": 2}), tiny.rule("heads", "atom"))
    given = problem(model, space, 300)
    tiny.perturb(given.net.grafts.deltas.parameters(), 0.1)
    open_ = torch.ones(len(space))
    open_[tiny.some(len(space), 3) & ~space.prunes] = 0  # some atoms closed
    given.net.z = open_
    model.eval()
    batch = given.train[0]
    score = _importance(given, "low_rank", [batch])
    loras = [(g, z) for g, z in zip(given.net.grafts.grafts, given.net.grafts.z, strict=True)
             if g.kind == "lora"]
    slopes = iter(torch.autograd.grad(
        given.loss(batch), [p for g, _ in loras for p in (g.delta.A, g.delta.B)]))
    expected = torch.zeros(len(space), dtype=torch.float64)
    heads = {p.site.layer: p for p in space.placements if p.kind == "heads"}
    for graft, z in loras:
        d, grad_a, grad_b = graft.delta, next(slopes), next(slopes)
        g = d.scaling * (grad_b @ torch.diag(z) @ d.A + d.B @ torch.diag(z) @ grad_a
                         - grad_b @ torch.diag(z) @ grad_a)
        module = model.get_submodule(graft.site.path)
        weight = module.weight.T if family == "gpt2" else module.weight
        if graft.site.index:
            weight = torch.cat([weight[a:b] for a, b in graft.site.index])
        value = (g * (weight + d.scaling * d.B @ torch.diag(z) @ d.A)).abs().double()
        mask = heads.get(graft.site.layer)
        kind = graft.site.role.removeprefix("attention.")
        if mask is not None and kind in ("query", "key", "value", "output"):
            along = value.sum(0) if kind == "output" else value.sum(1)
            units = space.unit[mask.start : mask.start + mask.width]
            expected[units] += along.view(len(units), -1).sum(1).detach()
    assert bool(expected[space.prunes].all())
    torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-9)


def test_low_rank_needs_lora() -> None:
    model = tiny.model("bert")
    given = problem(model, tiny.space(model, tiny.rule("bias"), tiny.rule("heads", "atom")), 300)
    with pytest.raises(InputError, match="needs LoRA, but space test has none"):
        _importance(given, "low_rank", [given.train[0]])


@pytest.mark.parametrize(("given", "message"), [
    ({"keep_flops": "0%"}, "--keep-flops must be a share in"),
    ({"keep_flops": "100%"}, "--keep-flops must be a share in"),
    ({"keep_weights": "half"}, "--keep-weights must be a share in"),
    ({"keep_flops": "60%", "keep_weights": "60%"}, "one limit on inference at a time"),
    ({"masks": "prune/layers"}, "--masks needs a limit"),
])
def test_what_cannot_be_asked_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        asked(given.get("keep_flops"), given.get("keep_weights"), None, given.get("masks"))
    assert "\n" not in str(caught.value)


def test_a_limit_below_what_masks_can_reach_is_refused() -> None:
    model = tiny.model("bert")
    space = Space("test", discover(model), [*PET, tiny.rule("heads", "atom")])
    with pytest.raises(InputError, match="must leave what the masks .* cannot remove, .*%"):
        keep_of(Prune("flops", "10%"), model, space)


def test_masks_and_a_limit_need_each_other() -> None:
    model = tiny.model("bert")
    with pytest.raises(InputError, match="need each other"):
        Limits(Space("test", discover(model), [*PET, *MASKS]), 100)
    with pytest.raises(InputError, match="masks alone"):
        Ask(space="prune/layers").units(model)


def test_a_spec_that_puts_pet_on_what_it_removes_is_refused() -> None:
    model = tiny.model("bert")
    limits = limits_on(model, "40%")
    keep = limits.fill(scores(limits, 0))
    spec = spec_for(model, limits, keep)
    whole = Space("test", discover(model), PET)
    every = whole.entries(torch.ones(len(whole), dtype=torch.bool))
    masks = tuple(e for e in spec.entries if e.kind in tiny.kinds(neutral=1))
    with pytest.raises(InputError, match="must not put PET on"):
        apply(model, spec.model_copy(update={"entries": (*every, *masks)}))


def test_supernet_gates_of_masks_are_the_masks() -> None:
    """A search's gate of 0 is what apply removes."""
    model, other = tiny.model("bert"), tiny.model("bert")
    limits = limits_on(model)
    keep = limits.fill(scores(limits, 3))
    net = Supernet(model, limits.space, tiny.head_of(model), 0)
    net.z = torch.where(limits.space.prunes, keep, False).float()
    apply(other, spec_for(other, limits, keep), remove=True)
    other.searchpet.z = [torch.zeros_like(z) for z in other.searchpet.z]
    batch = tiny.inputs("bert")
    torch.testing.assert_close(tiny.logits(model, batch), tiny.logits(other, batch),
                               rtol=1e-4, atol=1e-5)


def test_keep_is_a_number_of_the_blocks() -> None:
    model = tiny.model("bert")
    space = Space("test", discover(model), [*PET, *MASKS])
    keep: Keep = keep_of(Prune("weights", "50%"), model, space)
    # a block of BERT: q, k, v, o of 16 x 16, the feed-forward's 16 x 24 and 24 x 16
    assert keep.cost.dense == 2 * (4 * 16 * 16 + 2 * 16 * 24)
    assert keep.limit == keep.cost.dense // 2


def test_latency_is_a_sum_of_parts_and_falls_with_each() -> None:
    model = tiny.model("bert")
    sites = discover(model)
    table = Table(attention=5.0, ffn=7.0, head_feature=2.0, neuron=3.0)
    space = Space("test", sites, [*PET, *MASKS])
    keep = keep_of(Prune("latency", "50%"), model, space, table)
    assert keep.cost.dense == 2 * (5 + 16 * 2 + 7 + 24 * 3)
    z = torch.ones(len(space), dtype=torch.float64)
    for place in space.placements:
        if place.neutral == 1:
            less = z.clone()
            less[space.unit[place.start]] = 0
            saved = {"heads": 8 * 2, "neurons": 3 * place.run, "layers": keep.cost.dense / 2,
                     "sublayers": 37 if "attention" in place.site.role else 79}[place.kind]
            assert float(keep.cost.at(z) - keep.cost.at(less)) == saved


def test_latency_is_measured_on_really_smaller_models() -> None:
    config = transformers.BertConfig(hidden_size=256, num_hidden_layers=2, num_attention_heads=4,
                                     intermediate_size=2048, vocab_size=50)
    model = transformers.BertForSequenceClassification(config).eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    table = measure(model, discover(model))
    # a forward pass spends most of its time in this feed-forward
    assert 2048 * table.neuron + table.ffn > 256 * table.head_feature + table.attention > 0
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with pytest.raises(InputError, match="--keep-latency measures smaller models.*--keep-flops"):
        measure(torch.nn.Linear(2, 2), [])


def test_a_limit_on_what_costs_nothing_is_refused() -> None:
    model = tiny.model("bert")
    space = Space("test", discover(model), [*PET, *MASKS])
    free = Table(attention=0.0, ffn=0.0, head_feature=0.0, neuron=0.0)
    with pytest.raises(InputError, match="needs blocks that cost something.*take --keep-flops"):
        keep_of(Prune("latency", "50%"), model, space, free)

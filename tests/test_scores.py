"""Scores against numbers worked out by hand; the statistics they need against plain autograd."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from searchpet import catalog
from searchpet.discover import discover
from searchpet.errors import InputError
from searchpet.scores import (
    LowRank,
    Stats,
    contribution,
    degenerate,
    needs,
    needs_of,
    unit_scores,
)
from searchpet.stats import (
    add_movement,
    collect,
    collect_contributions,
    collect_or_warm,
    collect_parameters,
)
from searchpet.supernet import Supernet
from tests.laws import families as tiny
from tests.laws.problems import Draws

NAMES = catalog.names("scores")
W = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
G = torch.tensor([[0.5, 1.0], [-1.0, 4.0]])
# A (1, 2), B (2, 1): gB A = [1 2; -1 -2], B gA = [1.5 0; .5 0], gB gA = [.5 0; -.5 0]
LORA = LowRank(A=torch.tensor([[1.0, 2.0]]), B=torch.tensor([[3.0], [1.0]]),
               grad_A=torch.tensor([[0.5, 0.0]]), grad_B=torch.tensor([[1.0], [-1.0]]),
               scaling=2.0)


def full(weight: Tensor = W) -> Stats:
    """A Stats with everything that any score may need."""
    like = torch.ones_like(weight)
    return Stats(weight, grad=like, square=like, hessian_grad=like, norm=like[0], moved=like,
                 update=like, low_rank=LORA, generator=torch.Generator().manual_seed(0))


def score(name: str, stats: Stats) -> Tensor:
    found: Tensor = catalog.get("scores", name)(stats)
    return found


# --- each score by hand ---


def test_magnitude() -> None:
    assert score("magnitude", Stats(W)).tolist() == [[1.0, 2.0], [3.0, 0.5]]


def test_snip_is_weight_times_gradient() -> None:
    assert score("snip", Stats(W, grad=G)).tolist() == [[0.5, 2.0], [3.0, 2.0]]


def test_grasp_is_signed() -> None:
    assert score("grasp", Stats(W, hessian_grad=G)).tolist() == [[0.5, -2.0], [-3.0, 2.0]]


def test_movement_is_what_moved() -> None:
    assert score("movement", Stats(W, moved=G)).tolist() == G.tolist()


def test_wanda_scales_columns_by_their_inputs() -> None:
    stats = Stats(W, norm=torch.tensor([10.0, 2.0]))
    assert score("wanda", stats).tolist() == [[10.0, 4.0], [30.0, 1.0]]


def test_update_is_the_size_of_the_change() -> None:
    assert score("update", Stats(W, update=-G)).tolist() == [[0.5, 1.0], [1.0, 4.0]]


def test_fisher_is_weight_squared_times_gradient_squared() -> None:
    assert score("fisher", Stats(W, square=G.square())).tolist() == [[0.25, 4.0], [9.0, 4.0]]


def test_low_rank_is_snip_on_the_merged_weight_with_the_gradient_of_the_factors() -> None:
    weight = torch.tensor([[1.0, -1.0], [0.0, 2.0]])
    # G = 2 [2 2; 0 -2], W + 2 B A = [7 11; 2 6]
    found = score("low_rank", Stats(weight, low_rank=LORA))
    assert found.tolist() == [[28.0, 44.0], [0.0, 24.0]]


def test_the_gradient_of_low_rank_is_what_one_step_on_the_factors_does_to_the_weight() -> None:
    lora = LowRank(*(torch.randn(s, generator=torch.Generator().manual_seed(i))
                     for i, s in enumerate([(2, 5), (3, 2), (2, 5), (3, 2)])), scaling=0.7)
    moved = 0.7 * ((lora.B - lora.grad_B) @ (lora.A - lora.grad_A) - lora.B @ lora.A)
    weight = 1 - 0.7 * lora.B @ lora.A  # merged: ones
    found = score("low_rank", Stats(weight, low_rank=lora))
    torch.testing.assert_close(found, moved.abs(), rtol=1e-4, atol=1e-5)


def test_random_is_uniform_and_repeats_with_its_seed() -> None:
    def draw(seed: int) -> Tensor:
        stats = Stats(torch.zeros(100, 100), generator=torch.Generator().manual_seed(seed))
        return score("random", stats)

    assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))
    assert 0 <= draw(3).min() and draw(3).max() < 1
    assert float(draw(3).mean()) == pytest.approx(0.5, abs=0.02)


# --- laws of every score ---


@pytest.mark.parametrize("name", NAMES)
def test_a_score_has_the_weights_shape_and_changes_nothing(name: str) -> None:
    stats = full()
    before = {f.name: t.clone() for f in dataclasses.fields(stats)
              if isinstance(t := getattr(stats, f.name), Tensor)}
    found = score(name, stats)
    assert found.shape == W.shape and bool(found.isfinite().all())
    assert all(torch.equal(getattr(stats, name), t) for name, t in before.items())


@pytest.mark.parametrize("name", NAMES)
def test_a_score_names_what_it_lacks(name: str) -> None:
    wanted = needs_of(catalog.get("scores", name))
    assert wanted or name == "magnitude"
    for field in wanted:
        with pytest.raises(InputError, match=f"score {name} must have the statistic {field}"):
            score(name, dataclasses.replace(full(), **{field: None}))
    if not wanted:
        assert score(name, Stats(W)).shape == W.shape


@pytest.mark.parametrize("name", NAMES)
def test_a_score_gives_formula_and_source_in_its_first_line(name: str) -> None:
    assert "arXiv:" in catalog.describe("scores", name)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"low_rank", "wanda"}))
def test_scores_of_pet_parameters_may_have_any_shape(name: str) -> None:
    like = torch.ones(7)
    stats = Stats(like, grad=like, square=like, hessian_grad=like, moved=like, update=like,
                  generator=torch.Generator())
    assert score(name, stats).shape == (7,)


def test_a_statistic_of_another_shape_is_refused() -> None:
    with pytest.raises(InputError, match=r"grad must fit its weight, shape \(2, 3\)"):
        Stats(torch.zeros(2, 3), grad=torch.zeros(3, 2))
    with pytest.raises(InputError, match="norm must fit"):
        Stats(torch.zeros(2, 3), norm=torch.zeros(2))
    with pytest.raises(InputError, match="grad_B must fit"):
        Stats(W, low_rank=LORA._replace(grad_B=torch.zeros(1, 2)))


def test_a_score_from_outside_says_what_it_needs() -> None:
    @needs("grad", "norm")
    def both(stats: Stats) -> Tensor:
        assert stats.grad is not None and stats.norm is not None
        return stats.grad * stats.norm

    assert needs_of(both) == ("grad", "norm") and needs_of(lambda stats: stats.weight) == ()
    assert both(full()).shape == W.shape
    with pytest.raises(InputError, match="statistic norm, but it is None"):
        both(Stats(W, grad=G))


# --- units, degenerate scores ---


def test_units_sum_mean_and_norm_their_weights() -> None:
    score = torch.tensor([[3.0, 4.0], [1.0, 2.0], [0.0, -6.0]])
    rows = torch.tensor([[0], [1], [1]])
    assert unit_scores(score, rows).tolist() == [7.0, -3.0]
    assert unit_scores(score, rows, "mean").tolist() == [3.5, -0.75]
    assert unit_scores(score, rows, "l2").tolist() == pytest.approx([5.0, math.sqrt(41)])
    assert unit_scores(score, torch.tensor([1, 0])).tolist() == [0.0, 4.0]  # columns
    assert unit_scores(score, torch.tensor([[-1], [0], [-1]])).tolist() == [3.0]  # no unit


def test_a_unit_may_span_several_weights() -> None:
    scores = {"q": torch.tensor([[1.0], [2.0]]), "o": torch.tensor([[10.0, 20.0]])}
    units = {"q": torch.tensor([[0], [1]]), "o": torch.tensor([0, 1])}
    assert unit_scores(scores, units).tolist() == [11.0, 22.0]
    assert unit_scores(scores, units, "mean").tolist() == [5.5, 11.0]


def test_units_are_numbered_without_a_gap() -> None:
    with pytest.raises(InputError, match="none is 1"):
        unit_scores(W, torch.tensor([0, 2]))
    with pytest.raises(InputError, match="none is 0"):
        unit_scores(W, torch.tensor([-1, -1]))
    with pytest.raises(InputError, match="did you mean 'mean'"):
        unit_scores(W, torch.tensor([0, 1]), "means")
    with pytest.raises(InputError, match="every score"):
        unit_scores({"a": W}, {"b": torch.tensor([0, 1])})


def test_degenerate_is_exactly_equal() -> None:
    assert degenerate(torch.zeros(3, 2)) and degenerate(torch.full((4,), 0.3))
    assert not degenerate(torch.tensor([0.0, 1e-30]))
    assert not degenerate(torch.tensor([1.0])) and not degenerate(torch.zeros(0))
    assert degenerate({"a": torch.zeros(2), "b": torch.zeros(3, 1)})
    assert not degenerate({"a": torch.zeros(2), "b": torch.ones(2)})
    assert not degenerate(torch.tensor([float("nan")] * 2))


# --- statistics ---


def batches(rows: int = 2, count: int = 3) -> list[dict[str, Tensor]]:
    found = [Draws(5, rows)[step] for step in range(count)]
    for batch in found:
        batch["input_ids"][:, -1] = 1  # T5 reads its answer at the end of the text
    return found


def linears(model: nn.Module) -> list[str]:
    return sorted({s.path for s in discover(model) if s.form == "linear"})


def state(model: nn.Module) -> tuple[list[bool], list[bool], int, bool]:
    return ([p.requires_grad for p in model.parameters()], [m.training for m in model.modules()],
            tiny.hooks(model), any(p.grad is not None for p in model.parameters()))


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "albert"])
def test_statistics_are_those_of_plain_autograd(family: str) -> None:
    model = tiny.model(family)
    paths, given = linears(model), batches()
    weights = [model.get_parameter(f"{path}.weight") for path in paths]
    parts = [torch.autograd.grad(model(**b).loss, weights, allow_unused=True) for b in given]
    for p in model.parameters():
        p.requires_grad_(False)
    model.train()
    model.get_submodule(paths[0]).eval()
    before = state(model)
    found = collect(model, paths, given, lambda b: model(**b).loss, want=["grad", "square"])
    assert state(model) == before
    assert list(found) == paths
    for i, path in enumerate(paths):
        module = model.get_submodule(path)
        turned = not isinstance(module, nn.Linear)
        assert turned == (family == "gpt2")
        zero = torch.zeros_like(weights[i])
        own = torch.stack([zero if p[i] is None else p[i] for p in parts])
        own = own.mT if turned else own
        weight = weights[i].T if turned else weights[i]
        stats = found[path]
        torch.testing.assert_close(stats.weight, weight.detach())
        torch.testing.assert_close(stats.grad, own.mean(0), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(stats.square, own.square().mean(0), rtol=1e-4, atol=1e-10)
        assert stats.norm is None and stats.hessian_grad is None
    assert any(s.grad is not None and s.grad.any() for s in found.values())


def test_only_what_is_wanted_is_measured() -> None:
    model, called = tiny.model("bert"), []
    path = linears(model)[0]

    def loss(batch: dict[str, Tensor]) -> Tensor:
        called.append(torch.is_grad_enabled())
        return model(**batch).loss

    assert collect(model, [path], [], loss, want=[])[path].grad is None and not called
    given = batches(count=2)
    assert collect(model, [path], given, loss, want=["norm"])[path].grad is None
    assert called == [False, False]
    collect(model, [path], given, loss, want=["norm", "square", "grad"])
    assert called == [False, False, True, True]
    hessian = collect(model, {path: model.get_submodule(path)}, given, loss,
                      want=["hessian_grad"])[path]
    assert hessian.grad is None and hessian.hessian_grad is not None and len(called) == 8


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_the_norm_is_of_the_inputs_without_padding(family: str) -> None:
    model = tiny.model(family)
    paths, given = linears(model), batches(rows=3, count=2)
    alone = collect(model, paths, given, lambda b: model(**b).loss, want=["norm"])
    seen: list[Tensor] = []
    module = model.get_submodule(paths[0])
    handle = module.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    for batch in given:
        model(**batch)
    handle.remove()
    rows = torch.cat([x.flatten(0, -2) for x in seen])
    torch.testing.assert_close(alone[paths[0]].norm, rows.norm(dim=0))

    if family == "t5":
        return  # its decoder attends to itself without a mask, so padding changes its states
    longer = [{"input_ids": torch.nn.functional.pad(b["input_ids"], (0, 4)),
               "attention_mask": torch.nn.functional.pad(b["attention_mask"], (0, 4)),
               "labels": b["labels"]} for b in given]
    with_padding = collect(model, paths, longer, lambda b: model(**b).loss, want=["norm"])
    for path in paths:
        torch.testing.assert_close(with_padding[path].norm, alone[path].norm,
                                   rtol=1e-4, atol=1e-5)


def test_a_decoder_counts_its_own_tokens() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**tiny.CONFIGS["t5"])).eval()
    ids = torch.randint(2, tiny.WORDS, (2, 6))
    labels = torch.randint(2, tiny.WORDS, (2, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    padded = {**batch, "labels": torch.nn.functional.pad(labels, (0, 3), value=-100)}
    paths = [p for p in linears(model) if "SelfAttention" in p or "EncDec" in p]
    short, long = (collect(model, paths, [b], lambda b: model(**b).loss, want=["norm"])
                   for b in (batch, padded))
    for path in paths:
        torch.testing.assert_close(short[path].norm, long[path].norm, rtol=1e-4, atol=1e-5)


def test_the_hessian_times_the_gradient_of_a_quadratic() -> None:
    generator = torch.Generator().manual_seed(0)
    w = nn.Parameter(torch.randn(2, 3, generator=generator))
    v = nn.Parameter(torch.randn(2, generator=generator))
    given = []
    for _ in range(3):
        half = torch.randn(8, 8, generator=generator)
        given.append({"Q": half @ half.T, "b": torch.randn(8, generator=generator)})

    def loss(batch: dict[str, Tensor]) -> Tensor:
        x = torch.cat([w.flatten(), v])
        return 0.5 * x @ batch["Q"] @ x + batch["b"] @ x

    found = collect_parameters({"w": w, "v": v}, given, loss, want=["grad", "hessian_grad"])
    Q = torch.stack([b["Q"] for b in given]).mean(0)
    x = torch.cat([w.flatten(), v]).detach()
    g = Q @ x + torch.stack([b["b"] for b in given]).mean(0)
    for name, part in (("w", slice(0, 6)), ("v", slice(6, 8))):
        stats = found[name]
        torch.testing.assert_close(stats.grad.flatten(), g[part], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(stats.hessian_grad.flatten(), (Q @ g)[part],
                                   rtol=1e-4, atol=1e-3)


def test_grasp_says_how_much_gradient_flow_goes_with_a_weight() -> None:
    x = torch.tensor([1e-4, -2.0, 3.0])  # the first is small, so first order is exact enough
    Q = torch.tensor([[2.0, 1.0, 0.0], [1.0, 3.0, 0.5], [0.0, 0.5, 1.0]])
    stats = Stats(x, hessian_grad=Q @ (Q @ x))
    flow = (Q @ x).square().sum()
    without = (Q @ torch.cat([torch.zeros(1), x[1:]])).square().sum()
    lost = float(flow.double() - without.double())
    assert lost == pytest.approx(2 * float(score("grasp", stats)[0]), rel=0.05)
    assert lost < 0  # this one stands in the way: its score is below 0, and it goes first


def test_the_hessian_passes_through_fused_attention() -> None:
    found = []
    for attention in ("eager", "sdpa"):
        model = tiny.model("bert")
        model.set_attn_implementation(attention)
        found.append(collect(model, linears(model), batches(), lambda b, m=model: m(**b).loss,
                             want=["hessian_grad"]))
    eager, fused = found
    for path in eager:
        torch.testing.assert_close(eager[path].hessian_grad, fused[path].hessian_grad,
                                   rtol=1e-3, atol=1e-6)
    assert all(s.hessian_grad.any() for p, s in eager.items() if "value" in p)


def test_a_weight_beyond_the_loss_has_zeros_and_a_loss_without_weights_is_refused() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    found = collect_parameters({"a": a, "b": b}, [{}], lambda _: (3 * a).sum(),
                               want=["grad", "square", "hessian_grad"])
    assert found["a"].grad.tolist() == [3.0, 3.0] and found["a"].square.tolist() == [9.0, 9.0]
    assert not found["b"].grad.any() and not found["a"].hessian_grad.any()  # linear
    with torch.no_grad():
        a.add_(1)
    assert found["a"].weight.tolist() == [1.0, 1.0]  # what was scored, whatever trains on
    with pytest.raises(InputError, match="depends on none of the 1"):
        collect_parameters({"a": a}, [{}], lambda _: torch.ones(()), want=["grad"])


def test_bad_requests_are_refused() -> None:
    model = tiny.model("bert")
    path = linears(model)[0]
    loss = lambda b: model(**b).loss  # noqa: E731
    with pytest.raises(InputError, match="did you mean 'grad'"):
        collect(model, [path], batches(), loss, want=["gradd"])
    with pytest.raises(InputError, match="at least one batch"):
        collect(model, [path], [], loss, want=["grad"])
    with pytest.raises(InputError, match="is a LayerNorm"):
        collect(model, ["bert.embeddings.LayerNorm"], batches(), loss, want=["grad"])
    with pytest.raises(InputError, match="statistic must be one of"):
        collect_parameters({}, [], loss, want=["norm"])
    before = state(model)
    with pytest.raises(KeyError):
        collect(model, [path], [{}], lambda b: b["nothing"], want=["grad", "norm"])
    assert state(model) == before  # restored after an error too


def test_movement_adds_up_over_training() -> None:
    w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    still = nn.Parameter(torch.ones(1))
    moved: dict[str, Tensor] = {}
    for slope in ([1.0, 1.0, 0.0], [-3.0, 1.0, 2.0]):
        w.grad = torch.tensor(slope)
        add_movement(moved, {"w": w, "still": still})
        with torch.no_grad():
            w.sub_(0.5 * w.grad)
    # step 1: -(1, -2, 0); then w = (.5, -2.5, .5), step 2: -(-1.5, -2.5, 1)
    assert moved["w"].tolist() == [0.5, 4.5, -1.0] and moved["still"].tolist() == [0.0]
    assert score("movement", Stats(w.detach(), moved=moved["w"])).tolist() == [0.5, 4.5, -1.0]


# --- zero-initialised PET factors ---


def lora_net() -> Supernet:
    model = tiny.model("bert")
    placed = tiny.space(model, tiny.rule("lora", options={"rank": 2}, role="attention.*"))
    return Supernet(model, placed, frozenset(), seed=0)


def factors(net: Supernet) -> dict[str, nn.Parameter]:
    return {f"{g.key}/{n}": p for g in net.grafts.grafts for n, p in g.delta.named_parameters()}


def steps(net: Supernet, count: int = 2) -> Iterator[Tensor]:
    optimizer = torch.optim.Adam(factors(net).values(), lr=1e-2)
    for step in range(count):
        loss = net.model(**Draws(1)[step]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.detach()


def test_snip_tells_no_lora_factors_apart_at_init_but_after_a_warm_up() -> None:
    net = lora_net()
    snip = catalog.get("scores", "snip")
    given = batches()

    def measure() -> dict[str, Stats]:
        return collect_parameters(factors(net), given, lambda b: net.model(**b).loss,
                                  want=needs_of(snip))

    cold = {name: snip(stats) for name, stats in measure().items()}
    assert degenerate(cold) and not any(s.any() for s in cold.values())
    warm = collect_or_warm(measure, lambda: list(steps(net)) and None, snip)
    assert warm.warmed and not warm.flat and not degenerate(warm.scores)
    assert all(s.any() for s in warm.scores.values())
    assert not collect_or_warm(measure, lambda: pytest.fail("needless"), snip).warmed


@pytest.mark.parametrize(("name", "flat"), [("fisher", "AB"), ("magnitude", "B"), ("grasp", "B")])
def test_other_scores_have_no_order_within_zero_factors_and_are_warmed_too(
    name: str, flat: str
) -> None:
    net, of = lora_net(), catalog.get("scores", name)
    given = batches()

    def measure() -> dict[str, Stats]:
        return collect_parameters(factors(net), given, lambda b: net.model(**b).loss,
                                  want=needs_of(of))

    cold = {name for name, s in measure().items() if degenerate(of(s))}
    assert cold == {name for name in factors(net) if name[-1] in flat}
    warm = collect_or_warm(measure, lambda: list(steps(net)) and None, of)
    assert warm.warmed and not warm.flat


def test_a_score_that_stays_equal_is_refused_and_one_dead_tensor_is_named() -> None:
    alive, dead = Stats(torch.tensor([1.0, 2.0])), Stats(torch.zeros(2))
    magnitude = catalog.get("scores", "magnitude")
    with pytest.raises(InputError, match="after the warm-up too"):
        collect_or_warm(lambda: {"a": dead, "b": dead}, lambda: None, magnitude)
    found = collect_or_warm(lambda: {"a": alive, "b": dead}, lambda: None, magnitude)
    assert found.flat == ("b",) and found.warmed


def test_low_rank_needs_no_warm_up() -> None:
    net = lora_net()
    lora = net.grafts.grafts[0]
    own = {name: stats for name, stats in collect_parameters(
        {"A": lora.delta.A, "B": lora.delta.B}, batches(), lambda b: net.model(**b).loss,
        want=["grad"]).items()}
    weight = net.model.get_parameter(f"{lora.site.path}.weight").detach()
    low = LowRank(own["A"].weight, own["B"].weight, own["A"].grad, own["B"].grad,
                  lora.delta.scaling)
    assert not own["A"].grad.any() and own["B"].grad.any()
    assert not degenerate(score("low_rank", Stats(weight, low_rank=low)))


# --- what layers contribute ---


def test_contribution_is_one_minus_the_cosine_over_tokens_that_count() -> None:
    x = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]]])
    y = torch.tensor([[[1.0, 1.0], [0.0, -1.0], [7.0, 7.0]]])
    angle = 1 - 1 / math.sqrt(2)
    assert float(contribution(x, y)) == pytest.approx((angle + 2 + 0) / 3, abs=1e-6)
    first = torch.tensor([[1, 0, 0]])
    assert float(contribution(x, y, first)) == pytest.approx(angle, abs=1e-6)
    assert float(contribution(x, 3 * x)) == pytest.approx(0, abs=1e-6)  # length does not count
    with pytest.raises(InputError, match="at least one token"):
        contribution(x, y, torch.zeros(1, 3))
    with pytest.raises(InputError, match="one shape"):
        contribution(x, y[..., :1])
    with pytest.raises(InputError, match="one shape"):
        contribution(x, y, torch.ones(1, 2))


@pytest.mark.parametrize("family", ["gpt2", "llama", "vit", "t5"])
def test_a_layer_that_does_nothing_contributes_nothing(family: str) -> None:
    model = tiny.model(family)
    sites = [s for s in discover(model) if s.form == "layer"]
    given = [tiny.inputs(family, seed=s) for s in range(2)]
    dead = sites[1]
    outputs = {s.path for s in discover(model) if s.form == "block" and s.layer == dead.layer
               and s.part == dead.part}
    with torch.no_grad():
        for path in outputs:
            for p in model.get_submodule(path).parameters():
                p.zero_()
    model.train()
    before = state(model)
    found = collect_contributions(model, sites, given, lambda b: model(**b).logits)
    assert state(model) == before
    assert list(found) == [s.path for s in sites]
    assert found.pop(dead.path) == pytest.approx(0, abs=1e-6)
    assert min(found.values()) > 1e-4


def test_contributions_are_of_the_hidden_states_without_padding() -> None:
    model = tiny.model("gpt2")
    sites = [s for s in discover(model) if s.form == "layer"]
    ids = tiny.inputs("gpt2")["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    batch = {"input_ids": ids * mask, "attention_mask": mask}
    found = collect_contributions(model, sites, [batch, batch], lambda b: model(**b).logits)
    with torch.no_grad():
        x, y = model(**batch, output_hidden_states=True).hidden_states[:2]
    cosine = torch.cosine_similarity(x, y, dim=-1)[mask.bool()]
    assert found[sites[0].path] == pytest.approx(float((1 - cosine).mean()), rel=1e-5)


def test_only_layers_contribute() -> None:
    model = tiny.model("bert")
    site = next(s for s in discover(model) if s.form == "linear")
    with pytest.raises(InputError, match="form layer"):
        collect_contributions(model, [site], [], lambda b: model(**b).loss)

"""Laws of every kind of delta, on every form of site that it fits: a new file is tested too."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from searchpet import catalog
from searchpet.deltas import Delta, Stage
from searchpet.errors import InputError
from searchpet.site import Site
from searchpet.space import make

SITES = [
    Site("m.linear", "attention.query", 0, "linear", "encoder", 8, 7),
    Site("m.norm", "norm.ffn", 1, "norm", "encoder", 6, 6),
    Site("m.block", "ffn.block", 1, "block", "encoder", 5, 8, source="m.block"),
    Site("m.mixed", "attention.output", 1, "linear", "encoder", 8, 6, heads=4, kv_heads=2),
    Site("m.down", "ffn.out", 1, "linear", "encoder", 12, 4),
    Site("m", "layer", 1, "layer", "encoder", 6, 6),
]
# beside each kind's defaults; a new kind needs no entry
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "adapter": [{"bottleneck": 3}, {"bottleneck": 3, "stage": "parallel", "scaling": 4.0}],
    "blocks": [{"rows": 1, "columns": 2}],
    "lora": [{"rank": 3}, {"rank": 4, "alpha": 2.0, "rank_stabilised": True}],
    "lowrank_adapter": [{"reduction": 2}],
    "neurons": [{"most": 4, "multiple": 1}, {"most": 5, "multiple": 1}],
}
LOUD = [("lowrank_adapter", SITES[2], {"glorot": True})]  # documented as not silent at init
KINDS = catalog.names("deltas")
CASES = [
    (kind, site, options)
    for kind in KINDS for site in SITES if catalog.get("deltas", kind).fits(site)
    for options in [{}, *OPTIONS.get(kind, [])]
]


def name(case: Any) -> str:
    kind, site, options = case
    return "-".join([kind, site.form, *(f"{k}={v}" for k, v in options.items())])


every_case = pytest.mark.parametrize("case", CASES + LOUD, ids=name)
silent_case = pytest.mark.parametrize("case", CASES, ids=name)


def at(delta: Delta, x: Tensor, y: Tensor) -> Tensor:
    """What the delta is added to."""
    return x if delta.stage in ("input", "weight") else y


def build(case: Any, perturbed: bool = True) -> Delta:
    torch.manual_seed(0)
    kind, site, options = case
    delta = make(kind, site, options)
    if perturbed:
        with torch.no_grad():
            for p in delta.parameters():
                p.add_(torch.randn(p.shape))
    return delta


def data(delta: Delta, seed: int = 1) -> tuple[Tensor, Tensor]:
    """x (3, 4, d_in), y (3, 4, d_out); at stage `weight` x is a weight (d_out, d_in)."""
    generator = torch.Generator().manual_seed(seed)
    site = delta.site
    if delta.stage == "weight":
        weight = torch.randn(site.d_out, site.d_in, generator=generator)
        return weight, weight
    return (torch.randn(3, 4, site.d_in, generator=generator),
            torch.randn(3, 4, site.d_out, generator=generator))


def keeps(delta: Delta, source: st.DataObject) -> Tensor:
    """Any choice of coordinates, bool (width,); none only of a mask, which may remove all."""
    fewest = 1 if delta.neutral == 0 else 0
    kept = source.draw(st.sets(st.integers(0, max(0, delta.width - 1)), min_size=fewest,
                               max_size=delta.width))
    keep = torch.zeros(delta.width, dtype=torch.bool)
    keep[sorted(kept)] = True
    return keep


def test_every_kind_fits_some_form_of_site() -> None:
    assert {kind for kind, _, _ in CASES} == set(KINDS)


@silent_case
def test_silent_at_init(case: Any) -> None:
    delta = build(case, perturbed=False)
    x, y = data(delta)
    assert not delta(x, y, torch.ones(delta.width)).any()


@every_case
def test_silent_at_neutral_gates_whatever_the_weights(case: Any) -> None:
    delta = build(case)
    x, y = data(delta)
    out = delta(x, y, torch.full((delta.width,), delta.neutral))
    assert out.expand_as(at(delta, x, y)).shape == at(delta, x, y).shape
    assert not out.any()


@every_case
def test_cost_is_a_count_per_coordinate_and_sums_to_the_parameters(case: Any) -> None:
    kind, site, options = case
    with torch.device("meta"):
        shapes_only = make(kind, site, options)
    for delta in (build(case), shapes_only):
        cost = delta.cost()
        assert cost.dtype == torch.int64 and cost.shape == (delta.width,)
        assert cost.device.type == "cpu"
        assert bool((cost > 0).all()) if delta.neutral == 0 else not cost.any()
        assert int(cost.sum()) == sum(p.numel() for p in delta.parameters())


@every_case
def test_a_delta_has_the_site_and_trains_all_its_parameters(case: Any) -> None:
    delta = build(case)
    assert delta.site == case[1] and delta.width >= 1
    assert all(p.requires_grad and p.dtype == torch.float32 for p in delta.parameters())
    assert delta.stage in get_args(Stage)
    assert delta.neutral == 0 or not list(delta.parameters())


@every_case
def test_every_parameter_has_a_gradient_once_weights_are_perturbed(case: Any) -> None:
    delta = build(case)
    x, y = data(delta)
    x.requires_grad_()  # masks have no parameters: nothing else would have a gradient
    delta(x, y.requires_grad_(), torch.full((delta.width,), 0.7)).square().sum().backward()
    for p in delta.parameters():
        assert p.grad is not None and bool((p.grad != 0).any())


@every_case
def test_every_number_has_moved_after_two_steps_from_init(case: Any) -> None:
    delta = build(case, perturbed=False)
    if not list(delta.parameters()):
        assert delta.neutral == 1  # a mask has nothing to train
        return
    x, y = data(delta)
    target = data(delta, seed=2)[1]
    before = [p.detach().clone() for p in delta.parameters()]
    optimizer = torch.optim.Adam(delta.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        (y + delta(x, y, torch.ones(delta.width)) - target).square().mean().backward()
        optimizer.step()
    for (label, p), old in zip(delta.named_parameters(), before, strict=True):
        assert bool((p != old).all()), label


@every_case
@settings(max_examples=15, deadline=None)
@given(source=st.data())
def test_thin_is_the_same_function_as_gating(case: Any, source: st.DataObject) -> None:
    delta = build(case)
    x, y = data(delta)
    keep = keeps(delta, source)
    thin = delta.thin(keep)
    expected = delta(x, y, keep.float())
    torch.testing.assert_close(thin(x, y, torch.ones(thin.width)), expected)
    assert thin.width == int(keep.sum())
    assert sum(p.numel() for p in thin.parameters()) == int(delta.cost()[keep].sum())
    torch.testing.assert_close(thin.cost(), delta.cost()[keep])


@every_case
@settings(max_examples=10, deadline=None)
@given(source=st.data())
def test_thinning_twice_composes(case: Any, source: st.DataObject) -> None:
    delta = build(case)
    x, y = data(delta)
    first = keeps(delta, source)
    once = delta.thin(first)
    second = keeps(once, source)
    both = torch.zeros_like(first)
    both[first.nonzero().squeeze(-1)[second]] = True
    twice, direct = once.thin(second), delta.thin(both)
    ones = torch.ones(twice.width)
    torch.testing.assert_close(twice(x, y, ones), direct(x, y, ones))


@every_case
def test_a_thin_delta_shares_nothing_with_its_origin(case: Any) -> None:
    delta = build(case)
    x, y = data(delta)
    ones = torch.ones(delta.width)
    before = delta(x, y, ones).clone()
    with torch.no_grad():
        for p in delta.thin(torch.ones(delta.width, dtype=torch.bool)).parameters():
            p.fill_(9.0)
    torch.testing.assert_close(delta(x, y, ones), before, rtol=0, atol=0)


@every_case
def test_affine_is_the_forward(case: Any) -> None:
    delta = build(case)
    z = torch.rand(delta.width)
    affine = delta.affine(z)
    if affine is None:
        return  # the kind says that it is not affine; merge refuses it
    x, y = data(delta)
    if case[1].form == "linear":
        y = nn.Linear(case[1].d_in, case[1].d_out)(x)
    total = torch.zeros_like(y)
    total = total if affine.M is None else total + x @ affine.M.T
    total = total if affine.g is None else total + affine.g * y
    total = total if affine.c is None else total + affine.c
    torch.testing.assert_close(delta(x, y, z).expand_as(y), total)


@every_case
def test_gates_per_example_are_gates_row_by_row(case: Any) -> None:
    delta = build(case)
    if delta.stage == "weight":
        return  # one weight for all examples: refused where it is hooked in
    x, y = data(delta)
    z = torch.rand(len(y), 1, delta.width)
    to = at(delta, x, y)
    rows = [delta(x[i], y[i], z[i, 0]).expand_as(to[i]) for i in range(len(y))]
    torch.testing.assert_close(delta(x, y, z).expand_as(to), torch.stack(rows))


@every_case
def test_state_round_trips_through_a_file(case: Any, tmp_path: Path) -> None:
    delta = build(case)
    x, y = data(delta)
    keep = torch.arange(delta.width) % 2 == 0
    for full, empty in ((delta, build(case, perturbed=False)),
                        (delta.thin(keep), build(case, perturbed=False).thin(keep))):
        save_file(full.state_dict(), tmp_path / "delta.safetensors")
        stored = load_file(tmp_path / "delta.safetensors")
        assert stored.keys() == dict(full.named_parameters()).keys()  # no masks, no indices
        empty.load_state_dict(stored)
        ones = torch.ones(full.width)
        assert torch.equal(empty(x, y, ones), full(x, y, ones))


@every_case
def test_gradients_are_exact(case: Any) -> None:
    delta = build(case).double()
    names = [label for label, _ in delta.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in delta.parameters()]
    few = data(delta) if delta.stage == "weight" else (t[:1, :2] for t in data(delta))
    x, y = (t.double().requires_grad_() for t in few)
    z = torch.rand(delta.width, dtype=torch.float64, requires_grad=True)

    def forward(x: Tensor, y: Tensor, z: Tensor, *parameters: Tensor) -> Tensor:
        own = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(delta, own, (x, y, z)).expand_as(at(delta, x, y))

    assert torch.autograd.gradcheck(forward, (x, y, z, *values))


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_option_is_refused_by_name(kind: str) -> None:
    site = next(s for s in SITES if catalog.get("deltas", kind).fits(s))
    for option in ("nonsense", "channels", "site"):
        with pytest.raises(InputError, match=f"{kind}.*{option!r}") as caught:
            make(kind, site, {option: 1})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("kind", "option", "value"), [
    ("lora", "rank", 0), ("lora", "rank", -1), ("lora", "rank", 1.5), ("lora", "rank", "two"),
    ("lora", "rank", True), ("lora", "rank", 10**12), ("lora", "alpha", float("nan")),
    ("lora", "alpha", "big"), ("lora", "rank_stabilised", 1), ("adapter", "stage", "weight"),
    ("adapter", "bottleneck", 0), ("lowrank_adapter", "reduction", 0),
    ("lowrank_adapter", "glorot", "yes"),
])
def test_a_wrong_value_of_an_option_is_refused(kind: str, option: str, value: Any) -> None:
    site = next(s for s in SITES if catalog.get("deltas", kind).fits(s))
    with pytest.raises(InputError, match=f"{kind}.*{option}") as caught:
        make(kind, site, {option: value})
    assert "\n" not in str(caught.value)

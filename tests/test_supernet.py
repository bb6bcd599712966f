"""The supernet: where deltas act, in which order, and that gates alone decide what they do."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from searchpet.grafts import Graft, Grafts
from searchpet.site import Site
from searchpet.space import make
from searchpet.supernet import Supernet, seeded
from tests.laws import families as tiny

every_family = pytest.mark.parametrize("family", tiny.FAMILIES)


def net_of(family: str, **more: Any) -> Supernet:
    model = tiny.model(family)
    return tiny.supernet(model, tiny.space(model, *tiny.every_kind()), **more)


# --- in real families ---


@every_family
def test_a_fresh_supernet_is_the_backbone_to_the_bit(family: str) -> None:
    model, batch = tiny.model(family), tiny.inputs(family)
    before = tiny.logits(model, batch)
    rules = [*tiny.every_kind(), *tiny.every_mask()]
    net = tiny.supernet(model, tiny.space(model, *rules), trained=False)
    assert torch.equal(tiny.logits(model, batch), before)
    tiny.perturb(net.grafts.deltas.parameters(), 0.2)
    assert not torch.allclose(tiny.logits(model, batch), before)
    net.z = net.space.neutral
    assert torch.equal(tiny.logits(model, batch), before)


@every_family
def test_removing_the_deltas_leaves_the_backbone_to_the_bit(family: str) -> None:
    model, batch = tiny.model(family), tiny.inputs(family)
    before, hooks = tiny.logits(model, batch), tiny.hooks(model)
    net = tiny.supernet(model, tiny.space(model, *tiny.every_kind()))
    assert tiny.hooks(model) > hooks
    net.remove()
    assert tiny.hooks(model) == hooks
    assert torch.equal(tiny.logits(model, batch), before)


@every_family
def test_every_delta_is_reached(family: str) -> None:
    net = net_of(family)
    loss = net.model(**tiny.inputs(family), labels=torch.tensor([0, 1, 2])).loss
    loss.backward()
    for graft in net.grafts.grafts:
        # softmax ignores what is added to every key alike, so a key's bias has no gradient
        if not (graft.kind == "bias" and graft.site.role.endswith("attention.key")):
            gradients = [p.grad for p in graft.delta.parameters()]
            assert any(g is not None and bool(g.any()) for g in gradients), graft.key


@every_family
def test_only_deltas_and_head_train(family: str) -> None:
    net = net_of(family)
    head = tiny.head_of(net.model)
    assert {n for n, p in net.model.named_parameters() if p.requires_grad} == head
    rates = dict.fromkeys([*{g.kind for g in net.grafts.grafts}, "head"], 1.0)
    groups = net.groups(rates | {"bias": 0.5})
    assert len({group["kind"] for group in groups}) == len(groups)
    assert {g["kind"]: g["lr"] for g in groups} == rates | {"bias": 0.5}
    grouped = [id(p) for group in groups for p in group["params"]]
    named = dict(net.model.named_parameters())
    expected = [*net.grafts.deltas.parameters(), *(named[n] for n in head)]
    assert len(set(grouped)) == len(grouped)
    assert set(grouped) == {id(p) for p in expected}


@pytest.mark.parametrize("family", ["bert", "gpt2", "gpt_neox"])
def test_gates_per_example_are_gates_row_by_row(family: str) -> None:
    net, batch = net_of(family), tiny.inputs(family)
    z = torch.rand(3, len(net.space))
    net.z = z
    together = tiny.logits(net.model, batch)
    for i in range(3):
        net.z = z[i]
        alone = tiny.logits(net.model, {name: value[i : i + 1] for name, value in batch.items()})
        torch.testing.assert_close(alone[0], together[i])


def test_gates_per_example_need_one_row_per_example() -> None:
    net = net_of("bert")
    net.z = torch.ones(2, len(net.space))
    with pytest.raises(ValueError, match="z has 2 rows and y 3"):
        tiny.logits(net.model, tiny.inputs("bert"))


@pytest.mark.parametrize("grain", ["module", "layer", "role"])
def test_a_unit_gates_all_its_coordinates_and_no_other(grain: str) -> None:
    model = tiny.model("bert")
    net = tiny.supernet(model, tiny.space(model, tiny.rule("bias", grain)))
    z = torch.rand(len(net.space))
    net.z = z
    assert torch.equal(torch.cat(net.grafts.z), z[net.space.unit])


def test_the_gradient_of_the_gates_is_the_difference_quotient() -> None:
    model = tiny.model("gpt2").double()
    net = tiny.supernet(model, tiny.space(model, *tiny.every_kind()))
    net.grafts.double()
    batch = tiny.inputs("gpt2")
    generator = torch.Generator().manual_seed(0)
    z = torch.rand(len(net.space), generator=generator, dtype=torch.float64)
    way = torch.randn(len(net.space), generator=generator, dtype=torch.float64)

    def at(value: Tensor) -> Tensor:
        net.z = value
        return model(**batch).logits.square().sum()

    leaf = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(at(leaf), leaf)
    with torch.no_grad():
        slope = (at(z + 1e-6 * way) - at(z - 1e-6 * way)) / 2e-6
    assert float(gradient @ way) == pytest.approx(float(slope), rel=1e-5)


def test_a_delta_starts_the_same_whatever_stands_beside_it() -> None:
    model = tiny.model("bert")
    every, alone = tiny.space(model, *tiny.every_kind()), tiny.space(model, tiny.rule("lora"))
    full = Supernet(model, every, frozenset(), seed=3)
    full.remove()
    known = {g.key: g.delta for g in full.grafts.grafts}
    torch.manual_seed(99)
    before = torch.get_rng_state()
    few = Supernet(model, alone, frozenset(), seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    for graft in few.grafts.grafts:
        assert torch.equal(graft.delta.A, known[graft.key].A)
    other = seeded(few.grafts.grafts[0].site, "lora", {}, seed=4)
    assert not torch.equal(few.grafts.grafts[0].delta.A, other.A)
    starts = [graft.delta.A.flatten()[0].item() for graft in few.grafts.grafts]
    assert len(set(starts)) == len(starts)


def test_gates_move_with_the_model() -> None:
    net = net_of("bert")
    net.model.searchpet = net.grafts
    net.model.to("meta")
    assert {z.device.type for z in net.grafts.z} == {"meta"}


def test_a_copy_has_deltas_of_its_own() -> None:
    net, batch = net_of("bert"), tiny.inputs("bert")
    net.model.searchpet = net.grafts
    before = tiny.logits(net.model, batch)
    twin = copy.deepcopy(net.model)
    tiny.perturb(twin.searchpet.deltas.parameters(), 1.0)
    assert torch.equal(tiny.logits(net.model, batch), before)
    assert not torch.allclose(tiny.logits(twin, batch), before)


def test_bf16_products_keep_the_dtype_of_the_output() -> None:
    net, batch = net_of("bert"), tiny.inputs("bert")
    exact = tiny.logits(net.model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        rough = tiny.logits(net.model, batch)
    torch.testing.assert_close(rough.float(), exact, rtol=0.1, atol=0.1)


# --- order of what acts at one place ---

LINEAR = Site("f", "attention.output", 0, "linear", "encoder", 4, 6)
BLOCK = Site("f", "attention.block", 0, "block", "encoder", 5, 6, source="g")


class Toy(nn.Module):
    """g: (5) -> (4), f: (4) -> (6), called with positions, keywords, or for a tuple."""

    def __init__(self, call: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.g, self.call = nn.Linear(5, 4), call
        self.f = Pair(4, 6) if call == "tuple" else nn.Linear(4, 6)

    def forward(self, h: Tensor) -> Tensor:
        x = self.g(h)
        y = self.f(input=x) if self.call == "keyword" else self.f(x)
        return y[0] if isinstance(y, tuple) else y


class Pair(nn.Linear):
    """A linear whose output is a tuple, as many attentions' is."""

    def forward(self, input: Tensor) -> Any:
        return super().forward(input), "weights"


def grafts() -> Iterator[Graft]:
    """Two parallel deltas at a linear, a parallel one at the block, two sequential ones."""
    for site, kind, options in [
        (LINEAR, "lora", {"rank": 2}), (LINEAR, "scale", {}),
        (BLOCK, "adapter", {"bottleneck": 3, "stage": "parallel"}),
        (BLOCK, "adapter", {"bottleneck": 2}), (BLOCK, "lowrank_adapter", {}),
    ]:
        delta = make(kind, site, options)
        tiny.perturb(delta.parameters(), 0.5)
        yield Graft(site, kind, delta)


@pytest.mark.parametrize("call", ["position", "keyword", "tuple"])
def test_parallel_deltas_see_the_site_and_sequential_ones_what_those_made(call: str) -> None:
    toy, h = Toy(call), torch.randn(2, 3, 5)
    x = toy.g(h)
    plain = toy(h)
    own = list(grafts())
    lora, scale, beside, adapter, lowrank = (graft.delta for graft in own)
    held = Grafts(toy, own)
    held.z = [torch.rand(graft.delta.width) for graft in own]
    first = plain + lora(x, plain, held.z[0]) + scale(x, plain, held.z[1]) \
        + beside(h, plain, held.z[2])  # the block's input is h, not f's x
    last = first + adapter(x, first, held.z[3]) + lowrank(x, first, held.z[4])
    torch.testing.assert_close(toy(h), last)
    held.detach()
    assert torch.equal(toy(h), plain)


@pytest.mark.parametrize("index", [((0, 2),), ((4, 6),), ((0, 1), (3, 5))])
def test_a_virtual_site_changes_its_slice_only(index: tuple[tuple[int, int], ...]) -> None:
    toy, h = Toy("position"), torch.randn(2, 3, 5)
    rows = torch.cat([torch.arange(a, b) for a, b in index])
    site = Site("f", "attention.key", 0, "linear", "encoder", 4, len(rows), index=index)
    own = [Graft(site, kind, make(kind, site, {})) for kind in ("lora", "bias", "scale")]
    for graft in own:
        tiny.perturb(graft.delta.parameters(), 0.5)
    x, plain = toy.g(h), toy(h)
    Grafts(toy, own)
    change = sum(g.delta(x, plain[..., rows], torch.ones(g.delta.width)) for g in own)
    expected = plain.detach().clone()
    expected[..., rows] += change
    torch.testing.assert_close(toy(h), expected)


@every_family
def test_a_half_precision_backbone_takes_fp32_deltas(family: str) -> None:
    model, batch = tiny.model(family), tiny.inputs(family)
    net = tiny.supernet(model, tiny.space(model, *tiny.every_kind()), trained=True)
    exact = tiny.logits(model, batch)
    model.to(torch.bfloat16)
    net.grafts.deltas.to(torch.float32)
    halved = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()}
    logits = tiny.logits(model, halved)
    assert logits.dtype == torch.bfloat16
    # bf16 keeps 8 bits, through two layers; without the deltas the logits are far off
    alike = (logits.float() - exact).norm() / exact.norm()
    net.z = torch.zeros(len(net.space))
    bare = (tiny.logits(model, halved).float() - exact).norm() / exact.norm()
    assert alike < bare / 2 and alike < 0.3

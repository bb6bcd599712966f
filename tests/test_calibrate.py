"""The probe: it leaves nothing behind, and tau is the relative change of the first Adam step."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from searchpet import catalog
from searchpet.calibrate import probe, rates
from searchpet.supernet import Supernet
from tests.laws import families as tiny
from tests.laws.problems import Draws

TAU = 1e-3  # small, so that one step is linear
KINDS = catalog.names("deltas")


def net_of(kind: str, family: str = "bert") -> Supernet:
    model = tiny.model(family)
    return Supernet(model, tiny.space(model, tiny.rule(kind)), frozenset(), seed=0)


def loss_of(net: Supernet) -> Tensor:
    return net.model(**Draws(0)[0]).loss


def residuals(net: Supernet) -> dict[int, tuple[Tensor, Tensor]]:
    """Each delta's output and its site's, on the probe's batch."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def hook(number: int) -> Any:
        def remember(_: object, args: tuple[Tensor, ...], out: Tensor) -> None:
            seen[number] = out.detach().expand_as(args[1]).clone(), args[1].detach().clone()

        return remember

    handles = [d.register_forward_hook(hook(i)) for i, d in enumerate(net.grafts.deltas)]
    with torch.no_grad():
        loss_of(net)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_the_probe_leaves_parameters_gradients_and_hooks_as_they_were(kind: str) -> None:
    net = net_of(kind)
    tiny.perturb(net.grafts.deltas.parameters(), 0.1)
    before = [p.detach().clone() for p in net.grafts.deltas.parameters()]
    hooks = tiny.hooks(net.model) + tiny.hooks(net.grafts)
    found = probe(net.grafts, lambda: loss_of(net))
    assert found.keys() == {kind} and found[kind] > 0
    for p, old in zip(net.grafts.deltas.parameters(), before, strict=True):
        assert torch.equal(p, old) and p.grad is None
    assert tiny.hooks(net.model) + tiny.hooks(net.grafts) == hooks


@pytest.mark.parametrize("kind", KINDS)
def test_one_adam_step_changes_a_sites_output_by_tau(kind: str) -> None:
    net = net_of(kind)
    lr = rates(probe(net.grafts, lambda: loss_of(net)), TAU, {})[kind]
    sites = residuals(net)
    optimizer = torch.optim.Adam(net.grafts.deltas.parameters(), lr=lr, eps=1e-30)
    loss_of(net).backward()
    optimizer.step()
    ratios = []
    for i, delta in enumerate(net.grafts.deltas):
        residual, y = sites[i]
        assert not residual.any()  # silent at init
        # the site's own change: at the input that it had before the step
        x = None if delta.stage == "sequential" else inputs_of(net, i)
        with torch.no_grad():
            change = delta(x, y, torch.ones(delta.width)).expand_as(y)
        reached = change.flatten(0, -2).abs().amax(0) > 0
        if reached.any():
            ratios.append(float(change.norm() / y[..., reached].norm()))
    assert statistics.median(ratios) == pytest.approx(TAU, rel=0.1)


def inputs_of(net: Supernet, number: int) -> Tensor:
    """x of a parallel delta, taken with all deltas silent."""
    seen: list[Tensor] = []
    net.z = torch.zeros(len(net.space))
    handle = net.grafts.deltas[number].register_forward_hook(
        lambda _, args, __: seen.append(args[0].detach()))
    with torch.no_grad():
        loss_of(net)
    handle.remove()
    net.z = torch.ones(len(net.space))
    return seen[0]


def test_kinds_differ_at_one_rate_and_agree_at_their_own() -> None:
    model = tiny.model("bert")
    rules = [tiny.rule("lora", options={"rank": 8}), tiny.rule("bias")]
    net = Supernet(model, tiny.space(model, *rules), frozenset(), seed=0)
    found = probe(net.grafts, lambda: loss_of(net))
    assert found["lora"] / found["bias"] > 3
    moved = {kind: found[kind] * lr for kind, lr in rates(found, 0.1, {}).items()}
    assert moved == pytest.approx(dict.fromkeys(found, 0.1))


def test_fixed_rates_override_and_add() -> None:
    assert rates({"lora": 2.0, "bias": 4.0}, 0.1, {"bias": 7.0, "head": 1.0}) == {
        "lora": 0.05, "bias": 7.0, "head": 1.0}

"""The probe: it leaves nothing behind, and tau is the relative change of the first Adam step."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import Tensor

from searchpet.calibrate import probe, rates
from searchpet.supernet import Supernet
from tests.laws import families as tiny
from tests.laws.problems import Draws

TAU = 1e-3  # small, so that one step is linear
KINDS = tiny.kinds(neutral=0)


def net_of(kind: str, family: str = "bert") -> Supernet:
    model = tiny.model(family)
    return Supernet(model, tiny.space(model, tiny.rule(kind)), frozenset(), seed=0)


def loss_of(net: Supernet) -> Tensor:
    return net.model(**Draws(0)[0]).loss


def given(net: Supernet) -> dict[int, tuple[Tensor | None, Tensor]]:
    """Each delta's x and y on the probe's batch."""
    seen: dict[int, tuple[Tensor | None, Tensor]] = {}

    def remember(i: int, x: Tensor | None, y: Tensor) -> None:
        seen[i] = (x if x is None else x.clone(), y.clone())

    net.grafts.watch = remember
    with torch.no_grad():
        loss_of(net)
    net.grafts.watch = None
    return seen


@torch.no_grad()
def outputs(net: Supernet, sites: dict[int, tuple[Tensor | None, Tensor]]) -> list[Tensor]:
    """What each delta adds, gates open, at the x and y of `sites`."""
    return [delta(*sites[i], torch.ones(delta.width)).expand_as(sites[i][1])
            for i, delta in enumerate(net.grafts.deltas)]


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
    assert tiny.hooks(net.model) + tiny.hooks(net.grafts) == hooks and net.grafts.watch is None


@pytest.mark.parametrize("kind", KINDS)
def test_one_adam_step_changes_a_sites_output_by_tau(kind: str) -> None:
    net = net_of(kind)
    lr = rates(probe(net.grafts, lambda: loss_of(net)), TAU, {})[kind]
    sites = given(net)
    assert not any(out.any() for out in outputs(net, sites))  # silent at init
    optimizer = torch.optim.Adam(net.grafts.deltas.parameters(), lr=lr, eps=1e-30)
    loss_of(net).backward()
    optimizer.step()
    ratios = []
    # the sites' own changes: at the inputs that they had before the step
    for i, change in enumerate(outputs(net, sites)):
        y = sites[i][1]
        reached = change.flatten(0, -2).abs().amax(0) > 0
        if reached.any():
            ratios.append(float(change.norm() / y[..., reached].norm()))
    assert statistics.median(ratios) == pytest.approx(TAU, rel=0.1)


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

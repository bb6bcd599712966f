"""The probe: it leaves nothing behind, and tau is the relative change of the first Adam step."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch
from torch import Tensor

from searchpet.ask import Ask
from searchpet.calibrate import CROWD, DRAWN, HEAD_LR, groups, lowered, probe, rates, together
from searchpet.session import Session
from searchpet.settings import Settings
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


# --- all together ---


def entering(net: Supernet) -> Tensor:
    """What enters the head."""
    seen: list[Tensor] = []
    hook = net.model.classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        loss_of(net)
    hook.remove()
    return seen[0]


def test_the_joint_change_is_that_of_a_step_of_every_delta() -> None:
    net, lr = net_of("lora"), {"lora": 1e-3}
    before = entering(net)
    found = together(net.grafts, lambda: loss_of(net), [net.model.classifier], lr)
    assert torch.equal(entering(net), before)  # nothing is left behind
    assert not tiny.hooks(net.model.classifier)
    parameters = list(net.grafts.deltas.parameters())
    slopes = torch.autograd.grad(loss_of(net), parameters)
    with torch.no_grad():
        for p, g in zip(parameters, slopes, strict=True):
            p.sub_(1e-3 * g.sign())
    change = float((entering(net) - before).norm() / before.norm())
    assert found == pytest.approx(change, rel=0.05) and change > 0
    assert all(p.grad is None for p in parameters)


def test_the_joint_change_grows_with_rates_and_gates() -> None:
    net = net_of("bias")
    head = [net.model.classifier]
    once, twice = (together(net.grafts, lambda: loss_of(net), head, {"bias": lr})
                   for lr in (1e-4, 2e-4))
    assert twice == pytest.approx(2 * once, rel=0.05)
    net.z = torch.full((len(net.space),), 0.25)
    assert together(net.grafts, lambda: loss_of(net), head, {"bias": 1e-4}) < 0.5 * once


def test_without_a_head_that_is_called_there_is_no_joint_change() -> None:
    net = net_of("bias")
    assert together(net.grafts, lambda: loss_of(net), [], {"bias": 1.0}) == 0.0
    assert together(net.grafts, lambda: loss_of(net), [torch.nn.Linear(2, 2)], {"bias": 1.0}) == 0


def test_a_crowded_structure_is_slowed_to_what_a_step_may_change(tiny_folder: Path) -> None:
    session = Session(Settings(model=str(tiny_folder)))
    with session.fresh(0) as model:
        net = Supernet(model, Ask(space="wide").units(model), session.head, 0)
        measured = session.calibration(model, net.grafts, session.splits["train"], 0)
        found = measured.rates(tau=0.1)
        factor = measured.room(found, 0.1)
        slowed = {kind: factor * rate for kind, rate in found.items()}
        batch = session.splits["train"].batches(8, 0)[0]
        change = together(net.grafts, lambda: model(**batch).loss, [model.classifier], slowed)
        assert factor < 1 and change == pytest.approx(CROWD * 0.1, rel=1e-3)
        net.z = torch.full((len(net.space),), 1e-3)
        assert measured.room(found, 0.1) == 1.0  # hardly anything moves
        net.remove()
    by_hand = Session(Settings(model=str(tiny_folder), lr=1e-3))
    with by_hand.fresh(0) as model:
        net = Supernet(model, Ask(space="wide").units(model), by_hand.head, 0)
        measured = by_hand.calibration(model, net.grafts, by_hand.splits["train"], 0)
        assert set(measured.rates(0.1).values()) == {HEAD_LR, 1e-3}
        assert DRAWN not in measured.rates(0.1)
        assert measured.room({}, 0.1) == 1.0
        net.remove()


def test_what_is_drawn_moves_by_no_more_than_a_share_of_its_size() -> None:
    net = net_of("adapter")
    found = groups(net.grafts.grafts, net.head, {"adapter": 0.5, "head": 1.0, DRAWN: 0.1})
    assert [g["kind"] for g in found] == ["adapter", "adapter"]  # the net has no head of its own
    zero, drawn = found
    assert zero["lr"] == 0.5
    assert all(not p.any() for p in zero["params"]) and all(p.any() for p in drawn["params"])
    size = torch.cat([p.detach().flatten() for p in drawn["params"]]).square().mean().sqrt()
    assert drawn["lr"] == pytest.approx(0.1 * float(size))
    everything = [p for g in found for p in g["params"]]
    assert {id(p) for p in everything} == {id(p) for p in net.trained}
    assert len(everything) == len(net.trained)


def test_the_size_of_what_is_drawn_does_not_count_what_is_masked() -> None:
    net = net_of("adapter")
    rates_ = {"adapter": 0.5, "head": 1.0, DRAWN: 0.1}
    with torch.no_grad():
        for p in net.grafts.deltas.parameters():
            p.copy_(torch.where(p == 0, p, 0.2))
            if p.any():
                p.view(-1)[::2] = 0
    assert groups(net.grafts.grafts, net.head, rates_)[1]["lr"] == pytest.approx(0.02)


@pytest.mark.parametrize(("kind", "rates_"), [
    ("adapter", {"adapter": 0.5}),  # by hand
    ("scale", {"scale": 0.05, DRAWN: 0.1}),  # 1 at init, so 0.05 is less than a tenth of it
    ("bias", {"bias": 9.0, DRAWN: 0.1}),  # all zero: nothing is drawn
])
def test_otherwise_a_kind_has_one_rate(kind: str, rates_: dict[str, float]) -> None:
    net = net_of(kind)
    found = groups(net.grafts.grafts, net.head, {**rates_, "head": 1.0})
    assert [(g["kind"], g["lr"]) for g in found] == [(kind, rates_[kind])]


def test_lowering_leaves_the_head_and_relative_rates() -> None:
    assert lowered({"lora": 2.0, "head": 3.0, DRAWN: 4.0}, 0.5) == {
        "lora": 1.0, "head": 3.0, DRAWN: 4.0}

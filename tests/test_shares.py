"""Shares of the budget by kind: in expectation while searching, and in what is chosen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from searchpet.ask import Ask
from searchpet.discover import discover
from searchpet.limits import Limits
from searchpet.pruning import Prune, keep_of
from searchpet.space import Space
from tests.laws import families as tiny

RULES = [tiny.rule("lora", "atom", {"rank": 2}), tiny.rule("bias", "channel"),
         tiny.rule("scale", "channel")]
LIMIT = 300


def shared(share: dict[str, float], limit: int = LIMIT, prune: bool = False) -> Limits:
    model = tiny.model("bert")
    rules = [*RULES, *tiny.every_mask(neurons={"most": 6, "multiple": 2})] if prune else RULES
    space = Space("test", discover(model), rules, share)
    return Limits(space, limit, keep_of(Prune("flops", "60%"), model, space) if prune else None)


def spent(limits: Limits, z: torch.Tensor, kind: str) -> float:
    """Parameters of a kind where gates are z."""
    mine = torch.tensor([p.kind == kind for p in limits.space.placements])[limits.space.owner]
    prune = torch.where(limits.space.prunes, z.double(), 1.0)
    return float((limits.price(prune) * z)[mine].sum())


def draw(limits: Limits) -> torch.Tensor:
    return torch.rand(len(limits.space), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("prune", [False, True])
def test_every_kind_is_expected_to_spend_its_share(prune: bool) -> None:
    limits = shared({"lora": 0.5, "bias": 0.2}, prune=prune)
    p = limits.shift(draw(limits))
    found = [spent(limits, p, kind) for kind in ("lora", "bias", "scale")]
    assert found == pytest.approx([150, 60, 90], rel=1e-6)


@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize("density", [False, True])
def test_the_choice_keeps_to_the_shares_and_wastes_nothing(prune: bool, density: bool) -> None:
    limits = shared({"lora": 0.5, "bias": 0.2}, prune=prune)
    keep = limits.fill(draw(limits), density=density)
    spending = {kind: spent(limits, keep, kind) for kind in ("lora", "bias", "scale")}
    slack = LIMIT - sum(spending.values())
    assert slack == 0  # channels of one parameter fill whatever is left
    assert spending["lora"] <= 150 and spending["bias"] >= 60
    assert limits.parameters(keep) == LIMIT


def test_groups_keep_to_the_shares_too() -> None:
    limits = shared({"bias": 0.5}, limit=400)
    label = torch.where(torch.arange(len(limits.space)) >= 0, limits.space.owner, 0)
    score = torch.rand(len(limits.space.placements), generator=torch.Generator().manual_seed(1))
    keep = limits.fill(score[label], group=label)
    for owner in label.unique():
        assert len(set(keep[label == owner].tolist())) == 1
    assert limits.parameters(keep) <= 400
    assert spent(limits, keep, "bias") >= 100  # something of every part is bought


def test_a_kind_beyond_all_shares_buys_only_what_others_leave() -> None:
    limits = shared({"lora": 1.0}, limit=len("x") * 10_000)
    p = limits.shift(draw(limits))
    assert spent(limits, p, "bias") == spent(limits, p, "scale") == 0
    keep = limits.fill(draw(limits))
    everything = float(limits.space.cost[~limits.space.prunes].sum())
    assert spent(limits, keep, "lora") == pytest.approx(min(10_000, spent(
        limits, torch.ones(len(keep)), "lora")))
    assert limits.parameters(keep) == min(10_000, int(everything))


def test_the_gradient_of_a_share_stays_inside_it() -> None:
    limits = shared({"lora": 0.5})
    alpha = draw(limits).requires_grad_()
    mine = torch.tensor([p.kind == "lora" for p in limits.space.placements])[limits.space.owner]
    (gradient,) = torch.autograd.grad(limits.shift(alpha)[mine][0], alpha)
    assert float(gradient[mine].abs().sum()) > 0
    assert float(gradient[~mine].abs().sum()) == 0


def test_a_space_file_says_the_shares(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('''description = "a space with shares"
[[rule]]
kind = "lora"
grain = "atom"
options = { rank = 1 }
[[rule]]
kind = "bias"
grain = "channel"
[share]
bias = 0.25
''')
    assert Ask(space=str(path)).units(tiny.model("bert")).share == {"bias": 0.25}

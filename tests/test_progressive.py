"""Progressive: what stays on falls to the budget by Fisher's information, and may come back."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from searchpet.errors import InputError
from searchpet.slopes import information
from searchpet.strategies import Learner, Problem, Ranking
from searchpet.strategies.progressive import crowded, search, sizes
from tests.laws import families as tiny
from tests.laws.problems import Cut, classified

MASKED = [tiny.rule("lora", "atom", {"rank": 2}), tiny.rule("bias", "channel"),
          *tiny.every_mask(neurons={"most": 6, "multiple": 2})]


def asked(limit: int = 300, *, steps: int = 20, share: str = "", folder: Path | None = None,
          ) -> Problem:
    rules = MASKED if share else tiny.every_kind()
    return classified(rules, limit, steps=steps, share=share, folder=folder)


def watched(given: Problem, **more: float) -> tuple[Ranking, list[Tensor]]:
    """A search, and what was on at every step."""
    on: list[Tensor] = []
    given.watch = lambda step, p, price, figures: on.append(p.bool().clone())
    return search(given, **more), on


def test_what_is_on_falls_to_the_budget_on_a_cubic_schedule() -> None:
    given = asked(steps=40)
    total, plan = given.space.total, sizes(given, 0.2, 0.8, 6)
    assert list(plan) == [12, 16, 20, 24, 28, 32]
    assert plan[20] == 300 + int((total - 300) / 8) and plan[32] == 300
    ranking, on = watched(given, rounds=6)
    spent = [given.space.parameters(keep) for keep in on]
    assert spent[:12] == [total] * 12
    for start, end in zip(plan, [*list(plan)[1:], 40], strict=True):
        dearest = int(given.space.cost.max())
        assert plan[start] - dearest < spent[start] <= plan[start]
        assert len(set(spent[start:end])) == 1
    assert torch.equal(ranking.keep, on[-1])


def test_information_is_the_mean_square_of_the_slopes_of_single_rows() -> None:
    given = asked()
    net, batch = given.net, given.train[0]
    net.model.eval()
    on, learn = torch.ones(len(given.space), dtype=torch.bool), Learner(given)
    for _ in range(3):  # away from the silent start, where no gate has a slope
        learn.follow(information(net, given.loss, batch, on, learn.weights)[2])
    on[::3] = False
    loss, square, found = information(net, given.loss, batch, on, learn.weights)
    slopes = []
    for row in range(len(batch["labels"])):
        net.z = z = on.float().requires_grad_()
        own = given.loss({name: value[row : row + 1] for name, value in batch.items()})
        slopes.append(torch.autograd.grad(own, z)[0])
    wanted = torch.stack(slopes).double().square().mean(0)
    torch.testing.assert_close(square, wanted, rtol=1e-3, atol=1e-6 * float(wanted.max()))
    assert bool((square[on] > 0).any()) and bool((square[~on] > 0).any())
    net.z = on.float()
    total = given.loss(batch)
    torch.testing.assert_close(loss, total.detach())
    plain = torch.autograd.grad(total, learn.weights, materialize_grads=True)
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_a_learner_slows_the_deltas_and_not_the_head() -> None:
    given = asked()
    learn = Learner(given)
    rates = [g["lr"] for g in learn.param_groups]
    for factor in (0.1, 0.5):  # of the rates that it began with
        learn.crowd(factor)
        for group, rate in zip(learn.param_groups, rates, strict=True):
            assert group["lr"] == rate * (1.0 if group["kind"] == "head" else factor)
    assert {id(p) for p in learn.weights} == {id(p) for p in given.net.trained}


def test_a_closed_unit_can_come_back() -> None:
    _, on = watched(asked(steps=60), smooth=0.5, rounds=12)
    back = torch.zeros_like(on[0])
    for before, after in itertools.pairwise(on):
        back |= after & ~before
    assert bool(back.any())


def test_rates_rise_as_the_crowd_thins() -> None:
    given = asked(300)
    on = torch.ones(len(given.space), dtype=torch.bool)
    assert crowded(given, on) == pytest.approx(1.0)
    half = given.limits.at(round((300 * given.space.total) ** 0.5)).fill(torch.rand(len(on)))
    assert crowded(given, half) == pytest.approx(0.5, abs=0.02)
    assert crowded(given, given.limits.fill(torch.rand(len(on)))) == 0.0
    assert crowded(asked(10**9), on) == 0.0


@pytest.mark.parametrize("limit", [30, 300, 10**9])
def test_the_budget_holds_and_is_used(limit: int) -> None:
    given = asked(limit)
    ranking = search(given)
    spent = given.space.parameters(ranking.keep)
    assert spent <= limit
    assert spent > min(limit, given.space.total) - int(given.space.cost.min())
    assert len(given.space) == len(ranking.score)


def test_what_must_stay_and_what_is_settled_stays() -> None:
    given = asked(steps=6)
    must = torch.zeros(len(given.space), dtype=torch.bool)
    must[3] = True
    ranking, on = watched(replace(given, must=must))
    assert bool(ranking.keep[3]) and all(bool(keep[3]) for keep in on)
    given = asked(steps=6, share="60%")
    prunes = given.space.prunes
    settled = given.limits.fill(torch.rand(len(given.space)))
    ranking, on = watched(replace(given, settled=settled))
    for keep in (*on, ranking.keep):
        assert torch.equal(keep[prunes], settled[prunes])
    assert given.limits.parameters(ranking.keep) <= 300


@pytest.mark.parametrize("calls", [2, 13])
def test_a_search_that_was_cut_off_ends_the_same(calls: int, tmp_path: Path) -> None:
    whole = search(asked())
    given = asked(folder=tmp_path)
    Cut(given, calls)
    with pytest.raises(KeyboardInterrupt):
        search(given)
    again = asked(folder=tmp_path)
    count = Cut(again)
    found = search(again)
    assert torch.equal(found.score, whole.score) and torch.equal(found.keep, whole.keep)
    assert count.made == 20 - (calls - 1)  # one pass a step


@pytest.mark.parametrize(("given", "message"), [
    ({"warmup": 0.0}, "progressive.warmup must be a share of the steps in"),
    ({"until": 0.1}, "progressive.until must be a share of the steps from warmup"),
    ({"rounds": 0}, "progressive.rounds must be at least 1"),
    ({"smooth": 1.0}, "progressive.smooth must be in"),
])
def test_a_hyperparameter_out_of_range_is_one_line(given: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        search(asked(steps=2), **given)

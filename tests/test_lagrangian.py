"""The Lagrangian: its multipliers meet the budgets, and a cut-off search ends the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from searchpet.errors import InputError
from searchpet.strategies import Problem
from searchpet.strategies.lagrangian import Rule, search
from tests.laws import families as tiny
from tests.laws.problems import classified

MASKED = [tiny.rule("lora", "atom", {"rank": 2}), tiny.rule("bias", "channel"),
          *tiny.every_mask(neurons={"most": 6, "multiple": 2})]


def asked(limit: int, *, steps: int, share: str = "", folder: Path | None = None) -> Problem:
    rules = MASKED if share else tiny.every_kind()
    return classified(rules, limit, steps=steps, share=share, folder=folder)


@pytest.mark.parametrize("limit", [30, 300])
def test_the_multipliers_bring_the_gates_down_to_the_budget(limit: int) -> None:
    given, expected = asked(limit, steps=150), []
    given.watch = lambda step, p, price, figures: expected.append(float(figures["expected"]))
    ranking = search(given)
    assert expected[0] > 10 * limit
    assert 0.6 < expected[-1] / limit < 1.6
    assert given.space.parameters(ranking.keep) <= limit


def test_both_budgets_come_down_together() -> None:
    given = asked(300, steps=120, share="60%")
    assert given.keep is not None
    ranking = search(given)
    assert given.limits.parameters(ranking.keep) <= 300
    assert given.limits.kept(ranking.keep) <= given.keep.limit
    rule = Rule(given, torch.zeros(2, 2, dtype=torch.float64))
    left = rule.gaps(ranking.score, 0.0)
    assert bool((left.abs() < 0.6).all()), left  # of the learned gates, before the exact choice


def test_a_gap_costs_what_its_multipliers_say_and_raises_them() -> None:
    given = asked(300, steps=2)
    rule = Rule(given, torch.tensor([[0.5, 0.0], [2.0, 0.0]], dtype=torch.float64))
    total = float(given.space.total)
    p = torch.full((len(given.space),), 0.25, dtype=torch.float64)
    gaps = rule.gaps(p, 0.0)
    assert float(gaps[0].exp()) == pytest.approx(0.25 * total / 300)
    assert float(rule.gaps(p, 1.0)[0].exp()) == pytest.approx(0.25)
    gap = float(gaps[0])
    assert float(rule.penalty(gaps)) == pytest.approx(0.5 * gap + 2 * gap**2, rel=1e-5)
    rule.climb(gaps, 0.1)
    assert rule.dual[:, 0].tolist() == pytest.approx([0.5 + 0.1 * gap, 2 + 0.1 * gap**2])
    assert rule.dual[:, 1].tolist() == [0, 0]


def test_what_is_settled_stays_as_it_is() -> None:
    given = asked(300, steps=6, share="60%")
    prunes = given.space.prunes
    settled = given.limits.fill(torch.rand(len(given.space)))
    ranking = search(replace(given, settled=settled))
    assert torch.equal(ranking.keep[prunes], settled[prunes])


def test_a_search_that_was_cut_off_ends_the_same(tmp_path: Path) -> None:
    whole = search(asked(300, steps=8, share="60%"))
    given = asked(300, steps=8, share="60%", folder=tmp_path)
    reports = 0

    def watch(*_: object) -> None:
        nonlocal reports
        reports += 1
        if reports == 6:
            raise KeyboardInterrupt

    given.watch = watch
    with pytest.raises(KeyboardInterrupt):
        search(given)
    assert list(tmp_path.glob("*.checkpoint.safetensors"))
    again = search(asked(300, steps=8, share="60%", folder=tmp_path))
    assert torch.equal(again.score, whole.score) and torch.equal(again.keep, whole.keep)


@pytest.mark.parametrize(("given", "message"), [
    ({"alpha_lr": 0.0}, "lagrangian.alpha_lr must be above 0"),
    ({"dual_lr": -1.0}, "lagrangian.dual_lr must be above 0"),
    ({"warmup": 1.5}, "lagrangian.warmup must be a share"),
])
def test_a_hyperparameter_out_of_range_is_one_line(given: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        search(asked(30, steps=2), **given)

"""The knapsack: exact against brute force, never below the greedy choice, quick."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from searchpet.budget import fill
from searchpet.knapsack import WORK, pack


def worth(value: Tensor, keep: Tensor) -> float:
    """The value of what is kept; what only fills the slack counts as nothing."""
    return float(value[keep].clamp(min=0).sum())


def brute(value: Tensor, cost: Tensor, limit: int) -> float:
    """The best of all subsets."""
    choices = torch.tensor(list(itertools.product([0.0, 1.0], repeat=len(value))),
                           dtype=torch.float64)
    fits = choices @ cost.double() <= limit
    return float((choices[fits] @ value.clamp(min=0)).max())


units = st.lists(st.tuples(st.sampled_from([1, 2, 3, 6, 7, 12, 40]),
                           st.floats(-1, 10, allow_nan=False).map(lambda x: round(x, 3))),
                 min_size=1, max_size=11)


@settings(max_examples=300, deadline=None)
@given(units=units, share=st.floats(0, 1.1))
def test_it_is_the_best_of_all_choices(units: list[tuple[int, float]], share: float) -> None:
    cost = torch.tensor([c for c, _ in units])
    value = torch.tensor([v for _, v in units], dtype=torch.float64)
    limit = int(share * int(cost.sum()))
    keep = pack(value, cost, limit)
    assert int(cost[keep].sum()) <= limit
    assert worth(value, keep) == pytest.approx(brute(value, cost, limit), rel=1e-9, abs=1e-9)
    left = limit - int(cost[keep].sum())
    assert not bool((cost[~keep] <= left).any())  # nothing that is left would fit


def random(n: int, seed: int, prices: list[int]) -> tuple[Tensor, Tensor]:
    """Values that grow with their costs, with noise: those are hard."""
    draw = torch.Generator().manual_seed(seed)
    cost = torch.tensor(prices)[torch.randint(0, len(prices), (n,), generator=draw)]
    noise = torch.rand(n, generator=draw, dtype=torch.float64)
    return cost * (1 + 0.2 * noise) + noise, cost


@pytest.mark.parametrize("work", [WORK, 2000, 0])
def test_it_is_never_below_the_greedy_choice_and_near_the_optimum(work: int) -> None:
    better = 0
    for seed in range(60):
        value, cost = random(40, seed, [5, 9, 17, 31])
        limit = 20 + 5 * seed
        greedy = fill(value / cost, cost, limit)
        keep = pack(value, cost, limit, work)
        best = worth(value, pack(value, cost, limit))
        assert int(cost[keep].sum()) <= limit
        assert worth(value, greedy) <= worth(value, keep) <= best
        assert best - worth(value, keep) < float(value.max())
        better += worth(value, keep) > worth(value, greedy)
    assert better == 0 if work == 0 else better > 20


def test_what_greedy_wastes_is_found() -> None:
    value, cost = torch.tensor([10.0, 9.0, 9.0]), torch.tensor([6, 5, 5])
    assert fill(value / cost, cost, 10).tolist() == [False, True, True]
    value = torch.tensor([11.0, 9.0, 9.0])
    assert fill(value / cost, cost, 10).tolist() == [True, False, False]
    assert pack(value, cost, 10).tolist() == [False, True, True]


def test_where_greedy_is_best_it_stays() -> None:
    value = torch.tensor([1.0, 1.0, 1.0, 1.0])
    assert pack(value, torch.tensor([2, 2, 2, 2]), 5).tolist() == [True, True, False, False]
    assert pack(value, torch.tensor([2, 2, 2, 2]), 100).all()
    assert not pack(value, torch.tensor([2, 2, 2, 2]), 1).any()
    assert pack(torch.zeros(0), torch.zeros(0, dtype=torch.int64), 3).tolist() == []


def test_a_common_divisor_makes_large_costs_small() -> None:
    value, cost = random(400, 0, [512 * k for k in (2, 3, 5, 8)])
    limit = 512 * 301 + 511
    small, large = (pack(value, c, n) for c, n in ((cost // 512, 301), (cost, limit)))
    assert worth(value, small) == pytest.approx(worth(value, large))


@pytest.mark.parametrize("limit", [2_271, 22_713, 227_134])
def test_twenty_thousand_units_are_quick(limit: int) -> None:
    draw = torch.Generator().manual_seed(limit)
    prices = torch.tensor([1] * 17_000 + [768] * 1_500 + [1_152] * 1_000 + [1_920] * 500)
    value = torch.rand(20_000, generator=draw, dtype=torch.float64) * prices.sqrt()
    began = time.process_time()
    keep = pack(value, prices, limit)
    assert time.process_time() - began < 10
    assert int(prices[keep].sum()) <= limit
    assert worth(value, keep) >= worth(value, fill(value / prices, prices, limit))

"""The budget: what is read, and that neither the search nor the choice ever exceeds it."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from searchpet.budget import Budget, fill, shift
from searchpet.errors import InputError

MINILM = 22_713_216  # parameters

# --- reading ---


@pytest.mark.parametrize(("text", "limit"), [
    ("0.01%", 2271), ("0.01 %", 2271), (" 100% ", MINILM), ("100.0%", MINILM), ("1e-2%", 2271),
    ("2271", 2271), (2271, 2271), ("1", 1), ("0", 0), ("1e3", 1000),
    ("9KB", 2250), ("9kb", 2250), ("9 KB", 2250), ("4B", 1), ("3B", 0), ("1MB", 250_000),
    ("0.5MB", 125_000), ("1GB", 250_000_000), ("0.000001%", 0),
])
def test_a_share_a_count_or_bytes(text: str | int, limit: int) -> None:
    budget = Budget.parse(text, MINILM)
    assert budget.limit == limit
    assert budget.denominator == MINILM and budget.text == str(text).strip()


@pytest.mark.parametrize("text", [
    "0%", "0.0%", "-1%", "101%", "100.0001%", "abc", "", "%", "KB", "1.5", "0.01", "NaN", "nan%",
    "inf", "inf%", "-5", "+5", "1,000", "1_000", "0x10", "9KiB", "9 K B", "5%%", "1e400",
    "1e999999999", "1e-999999999%", "1e999999999KB", "9" * 5000, "9" * 5000 + "%", "9" * 19,
    "1 2", "1\n2", "٣%", "½%", "999999999999999999GB", None,
])
def test_anything_else_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(InputError, match="budget") as caught:
        Budget.parse(text, MINILM)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_bare_fraction_says_how_to_write_a_share() -> None:
    with pytest.raises(InputError, match="write 0.01% for a share"):
        Budget.parse("0.01", MINILM)


@settings(deadline=None)
@given(digits=st.integers(1, 10_000), parameters=st.integers(1, 10**12))
def test_a_share_is_rounded_down_without_binary_rounding(digits: int, parameters: int) -> None:
    share = f"{digits // 100}.{digits % 100:02d}%"
    exact = Fraction(digits, 10_000) * parameters
    assert Budget.parse(share, parameters).limit == exact.numerator // exact.denominator


def test_a_share_that_binary_floats_get_wrong() -> None:
    assert int(0.29 * 100) == 28  # what a float would buy
    assert Budget.parse("29%", 100).limit == 29
    assert Budget.parse("0.07%", 10_000).limit == 7


def test_bytes_depend_on_the_size_of_an_element() -> None:
    assert Budget.parse("9KB", MINILM, element_size=2).limit == 4500


def test_a_budget_below_the_cheapest_unit_says_what_that_costs() -> None:
    budget = Budget.parse("10", 1000)
    budget.afford(10)
    with pytest.raises(InputError, match=r"cheapest costs 11 .*\(1.1%\), but got 10 parameters; .*"
                                         "at least 11"):
        budget.afford(11)


@pytest.mark.parametrize(("text", "said"), [
    ("10", "10 parameters"), ("1", "1 parameter"), ("0.2%", "0.2%, which is 2 parameters"),
    ("9B", "9B, which is 2 parameters"), ("1e1", "1e1, which is 10 parameters")])
def test_a_budget_says_its_count_once(text: str, said: str) -> None:
    assert Budget.parse(text, 1000).said == said


# --- shift ---

costs = st.lists(st.integers(0, 6).map(lambda e: 10**e) | st.integers(1, 10**6),
                 min_size=2, max_size=40)


def spread(n: int, seed: int, scale: float) -> Tensor:
    return scale * torch.randn(n, generator=torch.Generator().manual_seed(seed)).double()


def spent(p: Tensor, price: Tensor) -> float:
    return float((price * p).sum())


@settings(max_examples=300, deadline=None)
@given(price=costs, seed=st.integers(0, 10**6), exponent=st.floats(-3, 6),
       share=st.floats(1e-7, 1 - 1e-7))
def test_the_expected_cost_is_the_limit(
    price: list[int], seed: int, exponent: float, share: float
) -> None:
    cost = torch.tensor(price).double()
    limit = share * float(cost.sum())
    alpha = spread(len(price), seed, 10**exponent)
    p = shift(alpha, cost, limit)
    assert bool(((p >= 0) & (p <= 1)).all())
    assert spent(p, cost) == pytest.approx(limit, rel=1e-9)


def test_the_expected_cost_is_the_limit_over_thousands_of_heavy_tailed_spaces() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(3000):
        n = int(torch.randint(1, 200, (1,), generator=generator))
        tail, scale, share = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
        cost = (1 / torch.rand(n, generator=generator, dtype=torch.float64)) ** (3 * tail)
        alpha = 10 ** (6 * scale) * torch.randn(n, generator=generator, dtype=torch.float64)
        limit = share * float(cost.sum())
        assert spent(shift(alpha, cost, limit), cost) == pytest.approx(limit, rel=1e-9)


@pytest.mark.parametrize("limit", [1e-6, 1.0, 55.0, 109.9999, 110 - 1e-9])
@pytest.mark.parametrize("alpha", [[1e6, -1e6, 0.0], [0.0, 0.0, 0.0], [1e6, 1e6, 1e6],
                                   [5.0, 5.0, -1e6]])
def test_the_expected_cost_is_the_limit_at_the_extremes(alpha: list[float], limit: float) -> None:
    cost = torch.tensor([1.0, 9.0, 100.0])
    assert spent(shift(torch.tensor(alpha), cost, limit), cost) == pytest.approx(limit, rel=1e-9)


@settings(deadline=None)
@given(price=costs, seed=st.integers(0, 10**6), share=st.floats(0.01, 0.99))
def test_a_higher_logit_is_a_higher_probability(price: list[int], seed: int, share: float) -> None:
    cost = torch.tensor(price).double()
    alpha = spread(len(price), seed, 3.0)
    p = shift(alpha, cost, share * float(cost.sum()))
    assert bool((p[alpha.argsort()].diff() >= 0).all())


@settings(deadline=None)
@given(price=costs, seed=st.integers(0, 10**6), share=st.floats(0.01, 0.99),
       constant=st.floats(-1e3, 1e3))
def test_a_constant_on_all_logits_changes_nothing(
    price: list[int], seed: int, share: float, constant: float
) -> None:
    cost = torch.tensor(price).double()
    alpha = spread(len(price), seed, 3.0)
    limit = share * float(cost.sum())
    torch.testing.assert_close(
        shift(alpha + constant, cost, limit), shift(alpha, cost, limit), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("beta", [1.0, 0.3])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.95])
def test_the_gradient_is_that_of_the_constrained_probabilities(share: float, beta: float) -> None:
    cost = torch.tensor([1.0, 3.0, 10.0, 200.0, 1.0, 7.0], dtype=torch.float64)
    alpha = spread(6, 0, 1.0).requires_grad_()
    limit = share * float(cost.sum())
    assert torch.autograd.gradcheck(lambda a: shift(a, cost, limit, beta), (alpha,))
    (gradient,) = torch.autograd.grad((cost * shift(alpha, cost, limit, beta)).sum(), alpha)
    assert float(gradient.abs().max()) < 1e-9 * limit  # the expected cost cannot move


@pytest.mark.parametrize("limit", [114, 115, 1e9])
def test_all_gates_are_open_at_or_above_the_total(limit: float) -> None:
    alpha = torch.tensor([-50.0, 0.0, 50.0], requires_grad=True)
    p = shift(alpha, torch.tensor([100, 13, 1]), limit)
    assert torch.equal(p, torch.ones(3, dtype=torch.float64))
    p.sum().backward()
    assert alpha.grad is not None and not alpha.grad.any()


@pytest.mark.parametrize("limit", [0, -1, float("nan")])
def test_a_limit_must_be_above_zero(limit: float) -> None:
    with pytest.raises(ValueError, match="limit > 0 must hold"):
        shift(torch.zeros(2), torch.ones(2), limit)


def test_shift_of_many_units_starts_from_few_and_is_as_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    alpha = torch.randn(50_000, generator=generator, dtype=torch.float64) * 4
    cost = (10 ** (4 * torch.rand(50_000, generator=generator))).long().double()
    for share in (1e-4, 0.3, 0.999):
        limit = share * float(cost.sum())
        assert spent(shift(alpha, cost, limit), cost) == pytest.approx(limit, rel=1e-9)


# --- fill ---


def greedy(score: list[float], cost: list[int], limit: int) -> list[bool]:
    """The definition, one unit at a time."""
    keep = [False] * len(cost)
    for i in sorted(range(len(cost)), key=lambda i: (-score[i], i)):
        if cost[i] <= limit:
            keep[i], limit = True, limit - cost[i]
    return keep


units = st.lists(st.tuples(st.integers(-3, 3).map(float) | st.floats(-1e9, 1e9),
                           st.integers(0, 5).map(lambda e: 10**e) | st.integers(1, 10**5)),
                 min_size=1, max_size=60)


@settings(max_examples=300, deadline=None)
@given(units=units, limit=st.integers(0, 10**6))
def test_fill_is_the_greedy_choice_and_nothing_left_fits(
    units: list[tuple[float, int]], limit: int
) -> None:
    score, cost = (list(column) for column in zip(*units, strict=True))
    keep = fill(torch.tensor(score, dtype=torch.float64), torch.tensor(cost), limit)
    assert keep.dtype == torch.bool and keep.tolist() == greedy(score, cost, limit)
    used = int(torch.tensor(cost)[keep].sum())
    assert used <= limit
    assert all(used + c > limit for c, kept in zip(cost, keep.tolist(), strict=True) if not kept)


def test_fill_is_the_greedy_choice_over_thousands_of_random_spaces() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        n = int(torch.randint(1, 80, (1,), generator=generator))
        cost = (10 ** (5 * torch.rand(n, generator=generator))).long()
        score = torch.randint(0, 50, (n,), generator=generator).double()  # many ties
        limit = int(float(torch.rand(1, generator=generator)) * float(cost.sum()))
        keep = fill(score, cost, limit)
        assert keep.tolist() == greedy(score.tolist(), cost.tolist(), limit)


def test_ties_go_to_the_lower_index() -> None:
    keep = fill(torch.zeros(5), torch.tensor([2, 2, 2, 2, 2]), 5)
    assert keep.tolist() == [True, True, False, False, False]


def test_a_kept_unit_never_ranks_below_an_equally_dear_one() -> None:
    keep = fill(torch.tensor([1.0, 3.0, 2.0]), torch.tensor([4, 4, 4]), 9)
    assert keep.tolist() == [False, True, True]


@pytest.mark.slow
def test_a_million_units_are_quick() -> None:
    generator = torch.Generator().manual_seed(0)
    alpha = torch.randn(1_000_000, generator=generator, dtype=torch.float64)
    cost = torch.randint(1, 2000, (1_000_000,), generator=generator)
    limit = int(cost.sum()) // 1000

    def best(call: object, *args: object) -> float:
        times = []
        for _ in range(7):
            began = time.perf_counter()
            call(*args)  # type: ignore[operator]
            times.append(time.perf_counter() - began)
        return min(times)

    assert best(shift, alpha, cost.double(), limit) <= 0.05
    assert best(fill, alpha, cost, limit) <= 1.0

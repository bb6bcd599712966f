"""Gates: the distribution, gradient and shape of samples; the bounds of entropy."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from searchpet.gates import concrete, decided, entropy, hard_concrete, location, opening


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("p", [0.01, 0.2, 0.5, 0.9])
def test_a_gate_is_mostly_open_with_probability_p(p: float, temperature: float) -> None:
    n = 40_000
    z = concrete(torch.full((n,), p, dtype=torch.float64), temperature, seeded())
    deviation = (p * (1 - p) / n) ** 0.5
    assert float((z > 0.5).double().mean()) == pytest.approx(p, abs=4 * deviation)


def test_colder_gates_are_closer_to_open_or_closed() -> None:
    p = torch.full((10_000,), 0.5, dtype=torch.float64)
    undecided = [float((z * (1 - z)).mean())
                 for z in (concrete(p, t, seeded()) for t in (1.0, 0.5, 0.1))]
    assert undecided == sorted(undecided, reverse=True)


def test_the_gradient_is_the_difference_quotient_at_fixed_noise() -> None:
    p = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    weight = torch.arange(1.0, 8.0)

    def value(p: Tensor) -> Tensor:
        return (weight * concrete(p, 0.7, seeded(3))).sum().double()

    leaf = p.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    for i in range(7):
        step = torch.zeros_like(p)
        step[i] = 1e-3  # samples are float32
        slope = float((value(p + step) - value(p - step)) / 2e-3)
        assert float(gradient[i]) == pytest.approx(slope, rel=1e-2, abs=1e-3)


def test_certain_gates_are_open_or_closed_and_finite() -> None:
    p = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    z = concrete(p, 1.0, seeded())
    assert z[0] < 0.01 and z[1] > 0.99
    z.sum().backward()
    assert p.grad is not None and bool(p.grad.isfinite().all())


def test_rows_are_independent_samples_of_the_same_gates() -> None:
    p = torch.tensor([0.3, 0.8], dtype=torch.float64)
    assert concrete(p, 1.0, seeded()).shape == (2,)
    z = concrete(p, 1.0, seeded(), rows=20_000)
    assert z.shape == (20_000, 2) and z.dtype == torch.float32
    torch.testing.assert_close((z > 0.5).double().mean(0), p, atol=0.02, rtol=0)
    neighbours = torch.corrcoef(torch.stack([z[:-1, 0], z[1:, 0]]))
    assert abs(float(neighbours[0, 1])) < 0.03


def test_the_generator_is_the_only_randomness() -> None:
    p = torch.full((9,), 0.5, dtype=torch.float64)
    torch.manual_seed(1)
    first = concrete(p, 1.0, seeded(5))
    torch.manual_seed(2)
    assert torch.equal(first, concrete(p, 1.0, seeded(5)))
    assert not torch.equal(first, concrete(p, 1.0, seeded(6)))


def test_decided_is_the_price_of_the_gates_more_open_than_not() -> None:
    p = torch.tensor([0.2, 0.5, 0.7, 1.0], requires_grad=True)
    price = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    assert float(decided(p, price)) == 1100.0
    assert not decided(p, price).requires_grad


def test_entropy_is_in_bits_between_decided_and_undecided() -> None:
    assert float(entropy(torch.tensor([0.0, 1.0]))) == pytest.approx(0.0, abs=1e-9)
    assert float(entropy(torch.full((4,), 0.5))) == pytest.approx(1.0)
    middle = float(entropy(torch.tensor([0.0, 0.5])))
    assert middle == pytest.approx(0.5)
    assert not entropy(torch.tensor([0.5], requires_grad=True)).requires_grad


def test_hard_concrete_gates_are_the_formula_at_given_noise() -> None:
    s = torch.tensor([-3.0, -0.4, 0.0, 1.3, 6.0], dtype=torch.float64)
    u = torch.rand(5, generator=seeded(4), dtype=torch.float64)
    for value, noise, gate in zip(s.tolist(), u.tolist(), hard_concrete(s, seeded(4)),
                                  strict=True):
        inside = (math.log(noise) - math.log(1 - noise) + value) / (2 / 3)
        stretched = 1 / (1 + math.exp(-inside)) * 1.2 - 0.1
        assert float(gate) == pytest.approx(min(1.0, max(0.0, stretched)), abs=1e-6)


def test_half_noise_gives_the_hand_value_and_the_ends_are_exact() -> None:
    """At u = 1/2 and s = 0 the stretched sigmoid is 1/2; far out gates are 0 and 1, not nearly."""
    assert float(opening(torch.zeros(()))) == pytest.approx(
        1 / (1 + math.exp(2 / 3 * math.log(0.1 / 1.1))), abs=1e-7)  # 0.8318
    gates = hard_concrete(torch.tensor([-9.0, 9.0]).repeat(100), seeded())
    assert float(gates[0::2].max()) == 0.0 and float(gates[1::2].min()) == 1.0
    assert gates.dtype == torch.float32


@pytest.mark.parametrize("s", [-4.0, -1.6, 0.0, 2.0])
def test_the_expected_number_of_open_gates_is_what_is_simulated(s: float) -> None:
    n = 40_000
    logits = torch.full((n,), s, dtype=torch.float64)
    p = float(opening(logits[0]))
    open_ones = float((hard_concrete(logits, seeded()) > 0).double().mean())
    assert open_ones == pytest.approx(p, abs=4 * (p * (1 - p) / n) ** 0.5)


def test_location_is_the_inverse_of_opening() -> None:
    p = torch.linspace(0.001, 0.999, 25, dtype=torch.float64)
    torch.testing.assert_close(opening(location(p)), p)
    sure = location(torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True))
    assert bool(sure.isfinite().all()) and sure[0] < -25 < 25 < sure[1]
    assert hard_concrete(sure, seeded()).tolist() == [0.0, 1.0]


def test_the_gradient_of_a_hard_gate_is_that_of_its_slope_and_zero_where_it_is_clamped() -> None:
    s = torch.linspace(-3, 3, 13, dtype=torch.float64)
    leaf = s.clone().requires_grad_()
    gates = hard_concrete(leaf, seeded(1))
    (gradient,) = torch.autograd.grad(gates.sum(), leaf)
    slopes = (hard_concrete(s + 1e-3, seeded(1)) - hard_concrete(s - 1e-3, seeded(1))) / 2e-3
    torch.testing.assert_close(gradient.float(), slopes, atol=2e-2, rtol=2e-2)
    clamped = (gates == 0) | (gates == 1)
    assert 0 < int(clamped.sum()) < 13 and not gradient[clamped].any()

"""Allocation: exactly as many as asked for, where each mode says; patterns, schedules, greedy."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from searchpet.allocate import (
    ALLOCATIONS,
    SCHEDULES,
    apportion,
    blocks,
    cubic,
    exponential,
    keep_masks,
    kept,
    linear,
    n_m,
    one_shot,
    rounds,
    top,
)
from searchpet.errors import InputError

SHAPES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)) | st.tuples(st.integers(1, 9)),
                  min_size=1, max_size=5)
RATIOS = st.floats(0, 1)
SEEDS = st.integers(0, 2**31)


def drawn(shapes: list[tuple[int, ...]], seed: int, values: int = 4) -> dict[str, Tensor]:
    """Scores with many ties."""
    generator = torch.Generator().manual_seed(seed)
    return {f"w{i}": torch.randint(values, shape, generator=generator).float()
            for i, shape in enumerate(shapes)}


def costs(scores: dict[str, Tensor], how: str) -> dict[str, Tensor] | None:
    return {n: 1 + s.flip(0) for n, s in scores.items()} if how == "per_cost" else None


# --- how many ---


@settings(deadline=None)
@given(shapes=SHAPES, ratio=RATIOS, seed=SEEDS, how=st.sampled_from(sorted(ALLOCATIONS)))
def test_exactly_the_ratio_is_kept_in_every_mode(
    shapes: list[tuple[int, ...]], ratio: float, seed: int, how: str
) -> None:
    scores = drawn(shapes, seed)
    keep = keep_masks(scores, ratio, how, costs(scores, how))
    assert list(keep) == list(scores)
    assert all(k.dtype == torch.bool and k.shape == scores[n].shape for n, k in keep.items())
    count = sum(s.numel() for s in scores.values())
    assert sum(int(k.sum()) for k in keep.values()) == round(ratio * count)
    again = keep_masks(scores, ratio, how, costs(scores, how))
    assert all(torch.equal(keep[n], again[n]) for n in keep)


@settings(deadline=None)
@given(shapes=SHAPES, ratio=RATIOS, seed=SEEDS,
       how=st.sampled_from(["per_layer", "erdos_renyi", "per_row"]))
def test_what_is_kept_beats_what_is_not_within_a_tensor_or_row(
    shapes: list[tuple[int, ...]], ratio: float, seed: int, how: str
) -> None:
    scores = drawn(shapes, seed)
    for name, keep in keep_masks(scores, ratio, how).items():
        width = keep.shape[-1] if how == "per_row" else keep.numel()
        for s, k in zip(scores[name].reshape(-1, width), keep.reshape(-1, width), strict=True):
            if k.any() and not k.all():
                assert s[k].min() >= s[~k].max()


@settings(deadline=None)
@given(shapes=SHAPES, ratio=RATIOS, seed=SEEDS)
def test_per_layer_keeps_the_ratio_of_each_to_the_nearest_counts(
    shapes: list[tuple[int, ...]], ratio: float, seed: int
) -> None:
    scores = drawn(shapes, seed)
    count = sum(s.numel() for s in scores.values())
    for name, keep in keep_masks(scores, ratio, "per_layer").items():
        share = round(ratio * count) / count * scores[name].numel()
        assert abs(int(keep.sum()) - share) < 1 + 1e-9


@settings(deadline=None)
@given(shapes=SHAPES, ratio=RATIOS, seed=SEEDS)
def test_per_row_keeps_the_ratio_of_each_row(
    shapes: list[tuple[int, ...]], ratio: float, seed: int
) -> None:
    scores = drawn(shapes, seed)
    count = sum(s.numel() for s in scores.values())
    for keep in keep_masks(scores, ratio, "per_row").values():
        rows = keep if keep.dim() > 1 else keep[None]
        share = round(ratio * count) / count * rows.shape[1]
        assert bool(((rows.sum(1) - share).abs() < 1 + 1e-6).all())


@settings(deadline=None)
@given(shapes=SHAPES, ratio=RATIOS, seed=SEEDS)
def test_erdos_renyi_densities_follow_the_sides_where_not_full(
    shapes: list[tuple[int, ...]], ratio: float, seed: int
) -> None:
    keep = keep_masks(drawn(shapes, seed), ratio, "erdos_renyi").values()
    sides = [sum(shape) for shape in shapes]
    counts = [int(k.sum()) for k in keep]
    # density ∝ sides / numel, so count ∝ sides; each count is at most 1 from its share
    free = [i for i, shape in enumerate(shapes) if counts[i] < math.prod(shape)]
    rates = [((counts[i] - 1) / sides[i], (counts[i] + 1) / sides[i]) for i in free]
    if rates:
        assert max(low for low, _ in rates) <= min(high for _, high in rates) + 1e-9
        # a full one's share at that rate is no less than what it holds
        least = min(high for _, high in rates)
        for i in set(range(len(shapes))) - set(free):
            assert counts[i] - 1 <= least * sides[i] + 1e-9


def test_erdos_renyi_by_hand() -> None:
    # 4x4: 8 sides of 16; 8x8: 16 of 64; 2x30: 32 of 60.  Kept 35 of 140: 35 * (8, 16, 32) / 56
    scores = {name: torch.rand(shape) for name, shape in
              {"a": (4, 4), "b": (8, 8), "c": (2, 30)}.items()}
    counts = [int(k.sum()) for k in keep_masks(scores, 0.25, "erdos_renyi").values()]
    assert counts == [5, 10, 20]
    # 126 of 140: (18, 36, 72) -> a and c are full with 16 and 60, b takes the other 50
    assert [int(k.sum()) for k in keep_masks(scores, 0.9, "erdos_renyi").values()] == [16, 50, 60]


@settings(deadline=None)
@given(weights=st.lists(st.integers(1, 50), min_size=1, max_size=6), data=st.data())
def test_apportioned_counts_sum_up_within_their_caps(weights: list[int], data: st.DataObject,
                                                     ) -> None:
    caps = data.draw(st.lists(st.integers(0, 40), min_size=len(weights), max_size=len(weights)))
    total = data.draw(st.integers(0, sum(caps)))
    counts = apportion(weights, caps, total)
    assert sum(counts) == total
    assert all(0 <= n <= cap for n, cap in zip(counts, caps, strict=True))
    if all(Fraction(total * w, sum(weights)) <= c for w, c in zip(weights, caps, strict=True)):
        assert all(abs(n - Fraction(total * w, sum(weights))) < 1
                   for n, w in zip(counts, weights, strict=True))


def test_largest_remainders_go_up_and_ties_to_the_first() -> None:
    assert apportion([3, 3, 1], [9, 9, 9], 5) == [2, 2, 1]  # shares 2.14, 2.14, 0.71
    assert apportion([1, 1, 1], [9, 9, 9], 4) == [2, 1, 1]
    assert apportion([1, 1, 1], [1, 9, 9], 8) == [1, 4, 3]


# --- which ---


def test_global_has_one_threshold() -> None:
    scores = {"a": torch.tensor([[5.0, 1.0], [2.0, 0.0]]), "b": torch.tensor([4.0, 3.0])}
    keep = keep_masks(scores, 0.5)
    assert keep["a"].tolist() == [[True, False], [False, False]]
    assert keep["b"].tolist() == [True, True]


def test_per_layer_has_one_for_each() -> None:
    scores = {"a": torch.tensor([[5.0, 1.0], [2.0, 0.0]]), "b": torch.tensor([4.0, 3.0])}
    keep = keep_masks(scores, 0.5, "per_layer")
    assert keep["a"].tolist() == [[True, False], [True, False]]
    assert keep["b"].tolist() == [True, False]


def test_per_row_has_one_for_each_row() -> None:
    keep = keep_masks({"a": torch.tensor([[5.0, 4.0], [1.0, 2.0]])}, 0.5, "per_row")
    assert keep["a"].tolist() == [[True, False], [False, True]]


def test_per_cost_divides_by_the_cost() -> None:
    scores = {"a": torch.tensor([4.0, 9.0]), "b": torch.tensor([3.0, 2.0])}
    keep = keep_masks(scores, 0.5, "per_cost", {"a": torch.tensor([1.0, 9.0]), "b": 1.5})
    assert keep["a"].tolist() == [True, False]  # 4, 1
    assert keep["b"].tolist() == [True, False]  # 2, 1.33


@settings(deadline=None)
@given(size=st.integers(1, 60), seed=SEEDS, data=st.data())
def test_top_is_a_stable_sort(size: int, seed: int, data: st.DataObject) -> None:
    score = drawn([(size,)], seed)["w0"]
    k = data.draw(st.integers(0, size))
    order = sorted(range(size), key=lambda i: -float(score[i]))[:k]
    assert top(score, k).nonzero().flatten().tolist() == sorted(order)


def test_top_takes_infinite_half_and_whole_numbers() -> None:
    infinite = torch.tensor([-math.inf, 0.0, math.inf, math.inf])
    assert top(infinite, 3).tolist() == [False, True, True, True]
    assert top(torch.tensor([1.0, 2.0]).bfloat16(), 1).tolist() == [False, True]
    assert top(torch.tensor([2**40, 2**40 + 1]), 1).tolist() == [False, True]
    assert top(torch.tensor([[0.0, -0.0]]), 1).tolist() == [[True, False]]


def test_bad_allocations_are_refused() -> None:
    scores = {"a": torch.ones(2)}
    with pytest.raises(InputError, match="did you mean 'per_layer'"):
        keep_masks(scores, 0.5, "per_layers")
    for ratio in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match=r"in \[0, 1\]"):
            keep_masks(scores, ratio)
    with pytest.raises(InputError, match="a holds NaN"):
        keep_masks({"a": torch.tensor([1.0, math.nan])}, 0.5)
    with pytest.raises(InputError, match="at least one tensor"):
        keep_masks({}, 0.5)
    with pytest.raises(InputError, match="but got per_cost without it; single weights"):
        keep_masks(scores, 0.5, "per_cost")
    with pytest.raises(InputError, match="but got global with it"):
        keep_masks(scores, 0.5, "global", {"a": 1.0})
    for cost in ({}, {"a": 0.0}, {"a": torch.ones(3)}, {"a": torch.tensor([1.0, -1.0])}):
        with pytest.raises(InputError, match="above 0 for every element"):
            keep_masks(scores, 0.5, "per_cost", cost)


def test_kept_is_round() -> None:
    assert kept(0.1, 5) == round(0.1 * 5) and kept(0.5, 5) == round(2.5) == 2
    assert kept(0.0, 7) == 0 and kept(1.0, 7) == 7


# --- patterns ---


@settings(deadline=None)
@given(rows=st.integers(1, 5), groups=st.integers(1, 5), m=st.integers(1, 8), seed=SEEDS,
       axis=st.sampled_from([0, 1, -1]), data=st.data())
def test_n_m_keeps_the_n_best_of_every_m(rows: int, groups: int, m: int, seed: int, axis: int,
                                         data: st.DataObject) -> None:
    n = data.draw(st.integers(1, m))
    score = drawn([(rows, groups * m)], seed)["w0"]
    keep = n_m(score if axis else score.T, n, m, axis)
    keep = keep if axis else keep.T
    assert keep.shape == score.shape
    for s, k in zip(score.reshape(-1, m), keep.reshape(-1, m), strict=True):
        assert torch.equal(k, top(s, n))


def test_n_m_says_when_it_does_not_divide() -> None:
    with pytest.raises(InputError, match="6 elements and m is 4; leave"):
        n_m(torch.ones(4, 6), 2, 4)
    assert n_m(torch.ones(4, 6), 2, 4, axis=0).sum() == 12
    for n, m in ((0, 4), (5, 4), (-1, 2)):
        with pytest.raises(InputError, match="0 < n <= m"):
            n_m(torch.ones(4, 4), n, m)


def test_blocks_live_or_die_whole_by_their_sum() -> None:
    score = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 9.0]])
    assert blocks(score, 2, 2, 0.5).int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]
    assert blocks(score, 1, 4, 0.5).int().tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]
    assert blocks(score, 1, 2, 0.25).int().tolist() == [[0, 0, 0, 0], [0, 0, 1, 1]]
    for r, c in ((3, 2), (2, 3), (0, 1)):
        with pytest.raises(InputError, match="does not divide 2 x 4"):
            blocks(score, r, c, 0.5)


# --- schedules ---


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("ratio", [0.1, 0.15, 0.3, 0.7, 1.0])
def test_schedules_start_at_everything_and_end_at_the_target(name: str, ratio: float) -> None:
    path = [SCHEDULES[name](step, 10, 50, ratio) for step in range(70)]
    assert path[:10] == [1.0] * 10  # exactly: a count is rounded from it
    assert path[50:] == [ratio] * 20
    assert path == sorted(path, reverse=True)
    assert SCHEDULES[name](7, 7, 7, ratio) == ratio


def test_schedules_between_their_ends() -> None:
    # half-way: s = 0.8 * (1 - 0.5^3) = 0.7
    assert cubic(30, 10, 50, 0.2) == pytest.approx(0.3)
    assert cubic(20, 10, 50, 0.2) == pytest.approx(1 - 0.8 * (1 - 0.75**3))
    assert linear(30, 10, 50, 0.2) == pytest.approx(0.6)
    assert exponential(30, 10, 50, 0.25) == pytest.approx(0.5)
    assert one_shot(9, 10, 50, 0.2) == 1.0 and one_shot(10, 10, 50, 0.2) == 0.2
    with pytest.raises(InputError, match="begin <= end"):
        cubic(0, 5, 4, 0.5)


def test_rounds_remove_a_fifth_of_the_rest_and_end_at_the_target() -> None:
    assert rounds(0.5) == pytest.approx([0.8, 0.64, 0.512, 0.5])
    assert rounds(0.64) == [0.8, 0.64] and rounds(0.8) == [0.8] and rounds(1.0) == [1.0]
    assert rounds(0.25, per_round=0.5) == [0.5, 0.25]
    for ratio, each in ((0.0, 0.2), (1.5, 0.2), (0.5, 0.0), (0.5, 1.0)):
        with pytest.raises(InputError, match="rounds need"):
            rounds(ratio, each)


@given(ratio=st.floats(0.001, 1), each=st.floats(0.01, 0.9))
def test_rounds_fall_and_never_remove_more_than_asked(ratio: float, each: float) -> None:
    path = [1.0, *rounds(ratio, each)]
    assert path[-1] == ratio
    for before, after in itertools.pairwise(path):
        assert before * (1 - each) * (1 - 1e-6) <= after <= before
    assert path[1:] == sorted(set(path[1:]), reverse=True)

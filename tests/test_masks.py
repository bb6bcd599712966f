"""Masks: rows and blocks from single weights, and bits that come back as they went."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from searchpet.allocate import n_m
from searchpet.errors import InputError
from searchpet.masks import (
    Block,
    fingerprint,
    from_blocks,
    legal_n_m,
    packed,
    refill,
    regroup,
    unpacked,
)

SEEDS = st.integers(0, 2**31)


def drawn(rows: int, columns: int, seed: int, density: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, columns, generator=generator) < density


def planted(seed: int = 0, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """Four groups of 20 rows with 12 columns of 48 each, rows shuffled: mask, group of each row.
    """
    generator = torch.Generator().manual_seed(seed)
    group = torch.arange(80)[torch.randperm(80, generator=generator)] // 20
    mask = torch.arange(48)[None] // 12 == group[:, None]
    flip = torch.rand(80, 48, generator=generator) < noise
    return mask ^ flip, group


# --- refill ---


@settings(deadline=None)
@given(rows=st.integers(1, 12), columns=st.integers(1, 12), seed=SEEDS,
       density=st.floats(0, 1))
def test_refilled_rows_are_whole_and_as_many_as_the_weights_fill(
    rows: int, columns: int, seed: int, density: float
) -> None:
    mask = drawn(rows, columns, seed, density)
    before = mask.clone()
    found = refill(mask, torch.ones(rows, columns))
    assert torch.equal(mask, before) and found.shape == mask.shape
    assert torch.equal(found.all(1), found.any(1))
    assert abs(int(found.sum()) - int(mask.sum())) < columns
    assert bool(found.any()) == bool(mask.any())
    if found.any() and not found.all():
        assert mask[found.all(1)].sum(1).min() >= mask[~found.any(1)].sum(1).max()


def test_refill_ranks_by_count_then_by_what_is_left_then_by_order() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 1, 1]]).bool()
    assert refill(mask).any(1).tolist() == [True, True, False, False]  # 9 / 4 -> 2
    score = torch.tensor([[1.0, 1, 99, 99], [0, 0, 0, 0], [99, 1, 1.5, 99], [0, 0, 1, 1]])
    assert refill(mask, score).any(1).tolist() == [False, True, True, False]
    assert refill(torch.eye(4, dtype=torch.bool)[:1]).all()  # 0.25 of a row, but not nothing


def test_refill_of_no_mask_is_refused() -> None:
    for bad in (torch.ones(2, 2), torch.ones(2, dtype=torch.bool),
                torch.ones(0, 3, dtype=torch.bool)):
        with pytest.raises(InputError, match=r"bool \(d_out, d_in\)"):
            refill(bad)
    with pytest.raises(InputError, match="the mask's shape"):
        refill(torch.ones(2, 3, dtype=torch.bool), torch.ones(3, 2))


# --- regroup ---


def test_regroup_finds_planted_blocks_whole() -> None:
    mask, group = planted()
    found = regroup(mask, 4)
    assert found.covered == 1.0 and found.area == int(mask.sum()) == 960
    assert torch.equal(from_blocks(found.blocks, (80, 48)), mask)
    for block in found.blocks:
        assert len(group[block.rows].unique()) == 1 and len(block.rows) == 20
        assert len(block.columns) == 12


def test_regroup_beats_refill_under_noise() -> None:
    mask, _ = planted(noise=0.1)
    found = regroup(mask, 4)
    rows = int((refill(mask) & mask).sum()) / int(mask.sum())
    assert found.covered > 0.65 > rows + 0.2


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 24), columns=st.integers(1, 16), seed=SEEDS,
       density=st.floats(0, 1), parts=st.integers(1, 6), least=st.integers(1, 6),
       cover=st.none() | st.floats(0, 1))
def test_blocks_are_disjoint_and_cover_what_they_say(
    rows: int, columns: int, seed: int, density: float, parts: int, least: int,
    cover: float | None
) -> None:
    mask = drawn(rows, columns, seed, density)
    found = regroup(mask, parts, cover=cover, min_rows=least)
    assert len(found.blocks) <= parts
    every = [int(r) for block in found.blocks for r in block.rows]
    assert len(every) == len(set(every))
    dense = from_blocks(found.blocks, (rows, columns))
    count = int(mask.sum())
    assert int(dense.sum()) == found.area
    assert found.covered * count == pytest.approx(int((dense & mask).sum()))
    if cover is None:
        assert found.area <= count
        assert count == 0 or found.covered > 0
    else:
        assert found.covered >= cover - 1e-6
    used = int(mask.any(1).sum())
    for block in found.blocks:
        assert len(block.rows) >= min(least, used) and len(block.columns)
        assert bool(mask[block.rows].any(1).all())  # rows without weights are in no block
        assert bool(mask[block.rows][:, block.columns].any(0).all())  # nor are such columns
        assert block.rows.tolist() == sorted(block.rows.tolist())


def test_more_cover_takes_more_area() -> None:
    mask = drawn(64, 48, 3, 0.2)
    found = [regroup(mask, 4, cover=c) for c in (0.25, 0.5, 0.75, 1.0)]
    assert [f.area for f in found] == sorted({f.area for f in found})
    assert found[-1].covered == 1.0
    # stops as soon as it is enough: one column of a group holds at most its rows
    tallest = max(len(b.rows) for b in found[1].blocks)
    assert found[1].covered < 0.5 + (tallest + 1) / int(mask.sum())


def test_regroup_repeats_with_its_seed_and_refuses_nonsense() -> None:
    mask = drawn(40, 30, 1)
    a, b = regroup(mask, 4, seed=7), regroup(mask, 4, seed=7)
    assert a.area == b.area and a.covered == b.covered
    assert all(torch.equal(x, y) for p, q in zip(a.blocks, b.blocks, strict=True)
               for x, y in zip(p, q, strict=True))
    for bad in ({"parts": 0}, {"min_rows": 0}, {"cover": 1.5}):
        with pytest.raises(InputError, match="regroup needs"):
            regroup(mask, **bad)


def test_blocks_to_a_mask() -> None:
    block = Block(torch.tensor([0, 2]), torch.tensor([1, 3]))
    assert from_blocks([block], (3, 4)).int().tolist() == [
        [0, 1, 0, 1], [0, 0, 0, 0], [0, 1, 0, 1]]


# --- n:m ---


@given(rows=st.integers(1, 4), groups=st.integers(1, 4), m=st.integers(1, 6), seed=SEEDS,
       data=st.data())
def test_n_m_masks_are_legal_and_one_weight_more_is_not(
    rows: int, groups: int, m: int, seed: int, data: st.DataObject
) -> None:
    n = data.draw(st.integers(1, m))
    generator = torch.Generator().manual_seed(seed)
    mask = n_m(torch.rand(rows, groups * m, generator=generator), n, m)
    assert legal_n_m(mask, n, m)
    if n > 1:
        assert not legal_n_m(mask, n - 1, m)
    fewer = mask.clone()
    fewer[tuple(mask.nonzero()[0].tolist())] = False
    assert legal_n_m(fewer, n, m)  # at most n
    if n < m:
        more = mask.clone()
        more[tuple((~mask).nonzero()[0].tolist())] = True
        assert not legal_n_m(more, n, m)


def test_a_pattern_that_does_not_divide_is_not_legal() -> None:
    assert not legal_n_m(torch.zeros(2, 6, dtype=torch.bool), 2, 4)
    assert legal_n_m(torch.zeros(2, 6, dtype=torch.bool), 2, 3)


# --- bits ---


@given(rows=st.integers(0, 9), columns=st.integers(0, 9), seed=SEEDS)
def test_bits_come_back_as_they_went(rows: int, columns: int, seed: int) -> None:
    mask = drawn(rows, columns, seed, 0.5)
    bits = packed(mask)
    assert bits.dtype == torch.uint8 and bits.shape == (-(-rows * columns // 8),)
    back = unpacked(bits, (rows, columns))
    assert back.dtype == torch.bool and torch.equal(back, mask)
    assert torch.equal(unpacked(packed(mask.T), (columns, rows)), mask.T)  # not contiguous


def test_the_first_weight_is_the_highest_bit() -> None:
    mask = torch.tensor([[True, False, False], [False, True, True], [True, False, True]])
    assert packed(mask).tolist() == [0b10001110, 0b10000000]


def test_bits_of_another_shape_are_refused() -> None:
    bits = packed(torch.ones(3, 3, dtype=torch.bool))
    for shape in ((3, 6), (2, 2)):
        with pytest.raises(InputError, match="bytes, but got"):
            unpacked(bits, shape)
    with pytest.raises(InputError, match="1 bytes, but got"):
        unpacked(bits[:1].int(), (2, 4))
    with pytest.raises(InputError, match="must be 0, but are not"):
        unpacked(torch.tensor([255], dtype=torch.uint8), (1, 7))
    with pytest.raises(InputError, match="must be bool, but is float32"):
        packed(torch.ones(2, 2))


@given(rows=st.integers(1, 6), columns=st.integers(1, 6), seed=SEEDS)
def test_fingerprints_tell_masks_and_shapes_apart(rows: int, columns: int, seed: int) -> None:
    mask = drawn(rows, columns, seed, 0.5)
    name, count = fingerprint(mask)
    assert count == int(mask.sum()) and fingerprint(mask.clone()) == (name, count)
    other = mask.clone()
    other[0, 0] ^= True
    assert fingerprint(other)[0] != name
    assert rows == columns or fingerprint(mask.reshape(columns, rows))[0] != name


def test_a_fingerprint_is_that_of_shape_and_bits() -> None:
    mask = torch.eye(3, dtype=torch.bool)
    text = b"(3, 3)\n" + np.packbits(np.eye(3, dtype=bool)).tobytes()
    assert fingerprint(mask) == (hashlib.sha256(text).hexdigest(), 3)

"""Encoded rows, halves and batches: each row once per epoch, a function of seed and step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from searchpet.batch import Batches, Encoded, encode, halve, passes
from searchpet.errors import InputError
from searchpet.task import Split


def encoded(n: int, *, left: bool = False) -> Encoded:
    """Row i has 1 + i % 7 tokens, all equal to i + 1; label i % 3."""
    ids = [[i + 1] * (1 + i % 7) for i in range(n)]
    return Encoded({"input_ids": ids}, torch.arange(n) % 3, {"input_ids": 0}, left)


def test_encode_with_a_tokenizer(tiny_tokenizer: Any) -> None:
    split = Split((("the cat is good", ""), ("a dog", "it was")), (0.5, 1.0))
    rows = encode(split, tiny_tokenizer, max_length=6)
    assert len(rows) == 2 and rows.lengths.tolist() == [6, 5]
    batch = rows.batch([1, 0])
    assert batch["input_ids"].shape == (2, 6) and batch["labels"].tolist() == [1.0, 0.5]
    expected = tiny_tokenizer(
        ["", "the cat is good"], ["it was", "a dog"], truncation=True, max_length=6, padding=True,
        return_tensors="pt",
    )
    for name, values in expected.items():
        assert torch.equal(batch[name], values), name
    with pytest.raises(InputError, match="max_length"):
        encode(split, tiny_tokenizer, max_length=3)
    with pytest.raises(InputError, match="64"):
        encode(split, tiny_tokenizer, max_length=65)


def test_padding_side() -> None:
    right, left = (encoded(3, left=side).batch([0, 2]) for side in (False, True))
    assert right["input_ids"].tolist() == [[1, 0, 0], [3, 3, 3]]
    assert right["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert left["input_ids"].tolist() == [[0, 0, 1], [3, 3, 3]]


@pytest.mark.parametrize(("n", "size"), [(1000, 8), (1000, 7), (5, 32), (1, 1)])
def test_each_row_once_per_epoch(n: int, size: int) -> None:
    batches = Batches(encoded(n), size, seed=3)
    assert batches.steps_per_epoch == -(-n // size)
    for epoch in range(2):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        seen = torch.cat([batches[step]["input_ids"].max(1).values for step in steps])
        assert sorted(seen.tolist()) == list(range(1, n + 1))


def test_batches_are_a_function_of_seed_and_step() -> None:
    first, again, other = (Batches(encoded(300), 16, seed) for seed in (1, 1, 2))
    later = {step: again[step] for step in (40, 3, 19)}  # as after a resume, in any order
    for step, batch in later.items():
        assert all(torch.equal(first[step][name], batch[name]) for name in batch)
    assert any(not torch.equal(first[s]["labels"], other[s]["labels"]) for s in range(5))
    orders = [torch.cat(first.order(epoch)) for epoch in (0, 1)]
    assert not torch.equal(*orders)


def test_batches_hold_rows_of_like_length() -> None:
    batches = Batches(encoded(3000), 10, seed=0)
    filled = [batches[s]["attention_mask"].float().mean().item() for s in range(300)]
    assert np.mean(filled) > 0.95  # 0.57 for batches that are not bucketed


def test_bad_batches() -> None:
    with pytest.raises(InputError, match="0"):
        Batches(encoded(4), 0, seed=0)
    with pytest.raises(InputError, match="1 row"):
        list(passes(encoded(0), 4))


def test_passes_visit_each_row_once_longest_first() -> None:
    rows, batches = zip(*passes(encoded(50), 8), strict=True)
    assert sorted(torch.cat(rows).tolist()) == list(range(50))
    widths = [batch["input_ids"].shape[1] for batch in batches]
    assert widths == sorted(widths, reverse=True)
    assert torch.equal(rows[0] + 1, batches[0]["input_ids"].max(1).values)


def test_halves_are_disjoint_alike_and_seeded() -> None:
    whole = encoded(301)
    a, b = halve(whole, seed=0)
    ids = [[row[0] for row in half.tokens["input_ids"]] for half in (a, b)]
    assert sorted(ids[0] + ids[1]) == list(range(1, 302)) and abs(len(a) - len(b)) == 1
    assert a.labels is not None and b.labels is not None
    assert (a.labels.bincount() - b.labels.bincount()).abs().max() <= 1
    assert torch.equal(halve(whole, seed=0)[0].lengths, a.lengths)
    assert ids[0] != [row[0] for row in halve(whole, seed=1)[0].tokens["input_ids"]]
    with pytest.raises(InputError, match="2 rows"):
        halve(encoded(1), seed=0)

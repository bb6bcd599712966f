"""Bilevel's options: a gate sample for every row, and one pass a step for gates and deltas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from searchpet.errors import InputError
from searchpet.strategies import Problem, Ranking
from searchpet.strategies.bilevel import search
from tests.laws import families as tiny
from tests.laws.problems import Cut, classified

MASKED = [tiny.rule("lora", "atom", {"rank": 2}), *tiny.every_mask(neurons={"most": 6})]


def asked(*, steps: int = 10, share: str = "", folder: Path | None = None) -> Problem:
    given = classified(MASKED if share else tiny.every_kind(), 300, steps=steps, share=share,
                       folder=folder)
    if share:
        given.importance = lambda name, batches: torch.arange(len(given.space)).double()
    return given


def seen(given: Problem, **more: Any) -> tuple[Ranking, list[Tensor], list[Tensor]]:
    """A search; the gates of every pass, and the first text of its batch."""
    gates: list[Tensor] = []
    texts: list[Tensor] = []
    plain = given.loss

    def loss(batch: dict[str, Tensor]) -> Tensor:
        gates.append(given.net.z.detach().clone())
        texts.append(batch["input_ids"][0])
        return plain(batch)

    given.loss = loss
    return search(given, **more), gates, texts


@pytest.mark.parametrize(("levels", "passes"), [(2, 3 + 2 * 7), (1, 10)])
def test_one_level_takes_one_pass_a_step(levels: int, passes: int) -> None:
    given = asked()
    ranking, gates, texts = seen(given, levels=levels)
    assert len(gates) == passes
    assert all(bool((z == 1).all()) for z in gates[:3])  # the warm-up
    halves = [given.train, given.valid]
    for k, text in enumerate(texts[3:]):
        step, which = (3 + k, (3 + k) % 2) if levels == 1 else (3 + k // 2, (k + 1) % 2)
        assert torch.equal(text, halves[which][step]["input_ids"][0])
    assert given.space.parameters(ranking.keep) <= 300


@pytest.mark.parametrize("levels", [1, 2])
def test_rows_have_samples_of_their_own(levels: int) -> None:
    given = asked()
    _, gates, _ = seen(given, levels=levels, rows=True)
    count = len(given.train[0]["labels"])
    assert all(z.shape == (count, len(given.space)) for z in gates[3:])
    assert all(not torch.equal(z[0], z[1]) for z in gates[3:])
    assert all(z.dim() == 1 for z in seen(asked(), levels=levels, rows=False)[1])


def test_prune_gates_are_the_same_for_all_rows() -> None:
    given = asked(share="60%")
    ranking, gates, _ = seen(given, rows=True, levels=1)
    assert all(z.dim() == 1 for z in gates)
    assert given.limits.parameters(ranking.keep) <= 300
    assert given.keep is not None and given.limits.kept(ranking.keep) <= given.keep.limit


def test_one_pass_a_step_unless_masks_are_searched_as_well() -> None:
    assert len(seen(asked())[1]) == 10
    assert len(seen(asked(share="60%"))[1]) == 3 + 2 * 7


def test_both_learn_in_one_pass() -> None:
    """After a step of one level, alpha and the deltas have moved."""
    given = asked()
    start = [p.detach().clone() for p in given.net.trained]
    ranking, _, _ = seen(given, levels=1, warmup=0.0)
    assert len(ranking.score.unique()) > 1
    assert any(not torch.equal(a, b) for a, b in zip(start, given.net.trained, strict=True))


@pytest.mark.parametrize("levels", [1, 2])
def test_a_search_that_was_cut_off_ends_the_same(levels: int, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    whole = search(asked(), levels=levels, rows=True)
    given = asked(folder=tmp_path / "run")
    Cut(given, 8)
    with pytest.raises(KeyboardInterrupt):
        search(given, levels=levels, rows=True)
    again = search(asked(folder=tmp_path / "run"), levels=levels, rows=True)
    assert torch.equal(again.score, whole.score) and torch.equal(again.keep, whole.keep)


def test_levels_are_at_most_two() -> None:
    with pytest.raises(InputError, match="bilevel.levels must be 0, 1 or 2, but got 3"):
        search(asked(steps=1), levels=3)

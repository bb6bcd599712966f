"""Polish: exchanges that help are kept, others are taken back, and the budget holds throughout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from searchpet import searched
from searchpet.errors import InputError
from searchpet.space import Space
from searchpet.spec import BackboneId, BudgetUse, Spec
from searchpet.strategies import Problem, Ranking
from searchpet.strategies.polish import Bench, begin, search
from tests.laws import families as tiny
from tests.laws.problems import Cut, classified


def asked(limit: int = 300, *, steps: int = 20, keep: Tensor | None = None,
          folder: Path | None = None) -> Problem:
    given = classified(tiny.every_kind(), limit, steps=steps, folder=folder)
    if keep is not None:
        given.units_of = lambda name: keep
    return given


def drawn(limit: int, seed: int = 0) -> Tensor:
    given = asked(limit)
    score = torch.rand(len(given.space), generator=torch.Generator().manual_seed(seed))
    return given.limits.fill(score)


def judged(given: Problem, outcomes: list[float], patch: pytest.MonkeyPatch,
           ) -> list[tuple[Tensor, int, int]]:
    """Let trainings end at the given losses; which structures, for how long, and from where."""
    seen: list[tuple[Tensor, int, int]] = []
    train = Bench.train

    def told(self: Bench, on: Tensor, steps: int, at: int) -> float:
        seen.append((on.clone(), steps, at))
        train(self, on, steps, at)
        with torch.no_grad():
            self.problem.net.head[-1].fill_(float(len(seen)))  # a bias: alike for all classes
        return outcomes[len(seen) - 1]

    patch.setattr(Bench, "train", told)
    return seen


def test_what_helps_is_kept_and_what_does_not_is_taken_back(monkeypatch: pytest.MonkeyPatch,
                                                            ) -> None:
    given = asked(steps=40, keep=drawn(300))
    seen = judged(given, [9.0, 2.0, 1.0, 0.8, 0.9, 0.7, 0.75], monkeypatch)
    ranking = search(given, spec="given", rounds=3, swap=1.0)
    first, once, other, again, third, same, last = (on for on, _, _ in seen)
    assert [(steps, at) for _, steps, at in seen] == [
        (16, 0), (4, 16), (2, 18), (4, 20), (2, 22), (4, 24), (2, 26)]
    assert torch.equal(first, drawn(300)) and torch.equal(once, first)
    assert not torch.equal(other, first) and torch.equal(again, other)  # 1.0 < 2.0: kept
    assert torch.equal(same, other)  # 0.9 > 0.8: back to what it was
    assert torch.equal(ranking.keep, other)  # 0.75 > 0.7 as well
    assert float(given.net.head[-1].detach()[0]) == 6.0  # what `same` has learned
    tried = ranking.notes["tried"]
    assert [row["units"] for row in tried] == [
        int((b & ~a).sum()) for a, b in ((first, other), (other, third), (other, last))]
    assert [(row["loss"], row["exchanged"]) for row in tried] == [
        (2.0, 1.0), (0.8, 0.9), (0.7, 0.75)]
    assert all(given.space.parameters(on) <= 300 for on, _, _ in seen)
    score = ranking.score
    assert float(score[ranking.keep].min()) >= float(score[~ranking.keep].max())


def test_an_exchange_takes_the_least_and_brings_what_is_worth_most() -> None:
    given = asked(keep=drawn(300))
    on, bench = drawn(300), Bench(given, 2)
    bench.train(on, 6, 0)
    before = [p.detach().clone() for p in given.net.trained]
    worth = bench.probe(on, 6, 6)
    assert bool((worth[~on] > 0).any())
    assert any(not torch.equal(a, b) for a, b in zip(before, given.net.trained, strict=True))
    other = bench.exchange(on, worth, 0.25)
    cost = given.space.cost.double()
    out, new = on & ~other, other & ~on
    assert bool(out.any()) and float(cost[out].sum()) <= 75
    assert float(worth[new].sum()) > float(worth[out].sum())
    least = (worth / cost)[on].sort().values  # single channels are on, so the least of all can go
    assert float((worth / cost)[out].min()) == float(least[0])
    assert given.space.parameters(other) <= 300
    for swap in (0.5, 0.1):  # everything outside is better
        other = bench.exchange(on, torch.where(on, 1.0, 100.0).double() * cost, swap)
        assert 0 < float(cost[on & ~other].sum()) <= swap * 300


def test_room_is_filled_and_what_is_too_much_goes() -> None:
    small = drawn(60)
    bench = Bench(asked(keep=small), 2)
    full = bench.exchange(small, torch.rand(len(small)).double(), 0.25)
    assert 300 - 10 < asked().space.parameters(full) <= 300
    large = drawn(3000)
    given = asked(keep=large)
    kept = begin(given, "given", "")
    assert given.space.parameters(kept) <= 300 and not bool((kept & ~large).any())


def test_it_starts_from_what_a_strategy_finds() -> None:
    for of in ("random:unit", "progressive"):
        given = asked(steps=8)
        ranking = search(given, of=of)
        assert given.space.parameters(ranking.keep) <= 300


def test_a_search_that_was_cut_off_ends_the_same(tmp_path: Path) -> None:
    keep = drawn(300)

    def run(stop: int, folder: Path | None) -> tuple[Ranking, int]:
        given = asked(keep=keep, folder=folder)
        count = Cut(given, stop)
        return search(given, spec="given", batches=2), count.made

    (tmp_path / "run").mkdir()
    whole, total = run(0, None)
    with pytest.raises(KeyboardInterrupt):
        run(total - 4, tmp_path / "run")
    again, left = run(0, tmp_path / "run")
    assert torch.equal(again.keep, whole.keep) and torch.equal(again.score, whole.score)
    assert left < total


def test_a_spec_must_be_of_the_space(tmp_path: Path) -> None:
    given = asked()
    keep = drawn(300)
    used = given.space.parameters(keep)
    spec = Spec(backbone=BackboneId(name="b", revision=None, config_hash="c", parameters=10**6),
                entries=given.space.entries(keep),
                budget=BudgetUse(text="300", limit=300, used=used, slack=300 - used,
                                 denominator=10**6))
    (tmp_path / "spec.json").write_text(spec.text())
    assert torch.equal(searched.units_of(str(tmp_path), given.space), keep)
    other = Space("other", given.space.sites, [tiny.rule("bias", "channel")])
    with pytest.raises(InputError, match="must keep units of space other, but its .* is none"):
        searched.units_of(str(tmp_path), other)


@pytest.mark.parametrize(("given", "message"), [
    ({"settle": 1.0}, "polish.settle must be a share of the steps"),
    ({"rounds": 0}, "polish.rounds must be at least 1"),
    ({"swap": 0.0}, "polish.swap must be a share of the budget"),
    ({"batches": 0}, "polish.batches must be at least 1"),
    ({"of": "polish"}, "polish.of must be a strategy that keeps whole PET units"),
    ({"of": "sparse_adapter"}, "polish.of must be a strategy"),
    ({"of": "loss_delta"}, "polish.of must be a strategy"),
])
def test_a_wrong_hyperparameter_is_one_line(given: dict[str, float | str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        search(asked(steps=2), **given)

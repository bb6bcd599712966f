"""Stability selection: what most runs choose is kept, by frequency, and survives a crash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from searchpet import catalog
from searchpet.errors import InputError
from searchpet.run import RunFolder
from searchpet.strategies import Problem, Ranking
from searchpet.strategies.ensemble import histogram, search
from tests.laws import families as tiny
from tests.laws.problems import Cut, problem

CHEAP = [tiny.rule("bias", "channel", role="attention.query")]


def asked(limit: int, steps: int = 4, folder: Path | None = None) -> Problem:
    model = tiny.model("bert")
    space = tiny.space(model, *CHEAP)
    return problem(model, space, limit, steps=steps, every=0.0,
                   folder=RunFolder(folder) if folder else None)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replaces bilevel: run k keeps unit 0, unit 1 unless k = 0, and unit 2 + k; it trains."""
    seen: list[dict[str, Any]] = []

    def member(given: Problem) -> Ranking:
        k = len(seen)
        weights = given.net.trained
        seen.append({"start": [p.detach().clone() for p in weights], "problem": given})
        with torch.no_grad():
            for p in weights:
                p.add_(1.0)
        keep = torch.zeros(len(given.space), dtype=torch.bool)
        keep[[0, 1 if k else 9, 2 + k]] = True
        return Ranking(torch.arange(len(keep)).double(), keep)

    get = catalog.get
    monkeypatch.setattr(catalog, "get", lambda family, name: (
        member if (family, name) == ("strategies", "bilevel") else get(family, name)))
    return seen


def test_units_are_kept_by_frequency_and_ties_by_place(scripted: list[dict[str, Any]]) -> None:
    ranking = search(asked(4), runs=4)
    # 0 in all runs, 1 in three; 2 to 5 and 9 in one: the later ones stand higher in every run
    assert ranking.keep.nonzero().squeeze(-1).tolist() == [0, 1, 5, 9]
    assert ranking.score.argsort(descending=True)[:4].tolist() == [0, 1, 9, 5]
    assert (4 * ranking.score).floor().tolist()[:6] == [4, 3, 1, 1, 1, 1]
    assert ranking.notes == {"of": "bilevel", "runs": 4, "steps": 16,
                             "frequency": {"4/4": 1, "3/4": 1, "1/4": 2}}


def test_every_run_starts_alike_on_other_data(scripted: list[dict[str, Any]]) -> None:
    given = asked(4, steps=50)
    search(given, runs=4)
    for seen in scripted[1:]:
        assert all(map(torch.equal, seen["start"], scripted[0]["start"]))
    own = [seen["problem"] for seen in scripted]
    assert [p.train.source is given.train for p in own] == [True, False, True, False]
    assert [p.valid.source is given.valid for p in own] == [True, False, True, False]
    orders = [p.train.order for p in own]
    assert len({tuple(order) for order in orders}) == 4
    for order in orders:  # with replacement: about 63 % of them
        assert 20 < len(set(order)) < 45 and set(order) <= set(range(50))


def test_a_search_that_was_cut_off_ends_the_same(tmp_path: Path) -> None:
    def run(given: Problem, stop: int) -> Ranking:
        Cut(given, stop)
        return search(given, of="lagrangian", runs=3)

    whole = run(asked(5), 0)
    with pytest.raises(KeyboardInterrupt):
        run(asked(5, folder=tmp_path), 7)  # in the second run
    rest = run(asked(5, folder=tmp_path), 0)
    assert torch.equal(rest.score, whole.score) and torch.equal(rest.keep, whole.keep)


def test_variants_are_members_too() -> None:
    ranking = search(asked(5), of="random:unit", runs=3)
    assert int(ranking.keep.sum()) == 5


def test_a_histogram_counts() -> None:
    assert histogram(torch.tensor([2.0, 2.0, 0.0]), 2) == {"2/2": 2, "0/2": 1}


@pytest.mark.parametrize(("given", "message"), [
    ({"runs": 1}, "ensemble.runs must be at least 2"),
    ({"of": "ensemble"}, "must be another strategy"),
    ({"of": "bilevle"}, "did you mean 'bilevel'"),
])
def test_what_cannot_be_asked_is_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        search(asked(5), **given)

"""Wishes and several budgets: what must be kept is, what is forbidden has no place, and a larger
budget's choice contains a smaller one's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from searchpet import cli
from searchpet.choose import affordable, density_of, nested
from searchpet.errors import InputError
from searchpet.limits import Limits
from searchpet.patterns import patterns
from searchpet.space import Space
from searchpet.spec import Spec
from searchpet.strategies import Ranking
from tests.commands import workplace
from tests.laws import families as tiny

MODEL = tiny.model("bert")
SPACE = tiny.space(MODEL, tiny.rule("lora", "atom", {"rank": 2}), tiny.rule("bias", "channel"))
JOB = ["search", "--model", "tiny", "--task", "films", "--steps", "6", "--batch-size", "8",
       "--max-length", "16", "--controls", "0", "--quiet"]


def scores(seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(len(SPACE), generator=draw, dtype=torch.float64) * SPACE.cost.double().sqrt()


def where(keep: torch.Tensor, kind: str, role: str, layer: int) -> torch.Tensor:
    places = torch.tensor([(p.kind, p.site.role, p.site.layer) == (kind, role, layer)
                           for p in SPACE.placements])
    return keep[places[SPACE.owner]]


# --- one search, several limits -----------------------------------------------------------------


@pytest.mark.parametrize("density", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_a_larger_choice_contains_the_smaller_ones(seed: int, density: bool) -> None:
    limits = Limits(SPACE, 700)
    score = scores(seed)
    ranking = Ranking(score, limits.fill(score, density=density))
    assert density_of(limits, ranking) is density
    found = nested(limits, ranking, [7, 60, 61, 300, 700], "any")
    before = torch.zeros(len(SPACE), dtype=torch.bool)
    for own, keep in found:
        assert SPACE.parameters(keep) == own.limit  # channels fill whatever is left
        assert not bool((before & ~keep).any())
        before = keep
    smallest = found[0]
    assert torch.equal(smallest[1], Limits(SPACE, 7).fill(score, density=density))


def test_scores_that_do_not_say_the_choice_cannot_be_filled_again() -> None:
    limits = Limits(SPACE, 300)
    groups = limits.fill(scores(0)[SPACE.owner], group=SPACE.owner)
    with pytest.raises(InputError, match="several budgets must be filled from scores.*strategy x"):
        nested(limits, Ranking(scores(0), groups), [100, 300], "x")
    assert nested(limits, Ranking(scores(0), groups), [300], "x")[0][1] is groups


def test_what_must_be_kept_goes_first() -> None:
    (wish,) = patterns(["kind=bias,role=attention.query,layers=last 1"], "--must")
    must = SPACE.matching(wish, "--must")
    assert int(must.sum()) == 16 and bool(where(must, "bias", "attention.query", 1).all())
    limits = Limits(SPACE, 60, must=must)
    keep = limits.fill(scores(0), density=True)
    assert not bool((must & ~keep).any()) and SPACE.parameters(keep) <= 60
    p = limits.shift(torch.randn(len(SPACE), generator=torch.Generator().manual_seed(0)))
    assert bool((p[must] == 1).all())
    assert float((p * SPACE.cost).sum()) == pytest.approx(60)
    own = Ranking(scores(0), Limits(SPACE, 60).fill(scores(0)))  # a strategy that knew no wish
    assert bool(nested(limits, own, [60], "s3pet")[0][1][must].all())
    affordable(SPACE.cost, must, 16, "16")
    with pytest.raises(InputError, match="its 16 units cost 16 parameters, but 15 leaves 15"):
        affordable(SPACE.cost, must, 15, "15")


def test_a_share_pays_for_what_must_be_kept() -> None:
    space = Space("test", SPACE.sites, [tiny.rule("lora", "atom", {"rank": 2}),
                                        tiny.rule("bias", "channel")], {"bias": 0.5})
    must = space.matching(patterns(["kind=bias,role=ffn.out"], "--must")[0], "--must")
    limits = Limits(space, 100, must=must)
    bias = torch.tensor([p.kind == "bias" for p in space.placements])[space.owner]
    p = limits.shift(torch.zeros(len(space)))
    assert float((p * space.cost)[bias].sum()) == pytest.approx(50)
    keep = limits.fill(scores(1)[: len(space)], density=True)
    assert bool(keep[must].all()) and space.parameters(keep) <= 100
    beyond = Limits(space, 40, must=must)  # 32 channels of a part of 20
    p = beyond.shift(torch.zeros(len(space)))
    assert float((p * space.cost)[bias].sum()) == pytest.approx(32)
    assert int(beyond.fill(scores(1)[: len(space)])[bias].sum()) == 40  # no atom costs 8 or less


def test_what_is_forbidden_has_no_place() -> None:
    rules = [tiny.rule("lora"), tiny.rule("bias", "channel"), *tiny.every_mask()]
    space = Space("test", SPACE.sites, rules, forbid=patterns(
        ["kind=bias,role=ffn.*", "layers=first 1,form=linear"], "--forbid"))
    places = {(p.kind, p.site.role, p.site.layer) for p in space.placements if p.neutral == 0}
    assert ("bias", "attention.query", 1) in places and ("lora", "ffn.in", 1) in places
    assert not [p for p in places if p[0] == "bias" and p[1].startswith("ffn")]
    assert not [p for p in places if p[2] == 0 and not p[1].startswith("norm")]
    assert {p.kind for p in space.placements if p.neutral == 1} == {
        p.kind for p in Space("test", SPACE.sites, rules).placements if p.neutral == 1}


@pytest.mark.parametrize(("text", "message"), [
    ("bias", "--must must read KEY=VALUE"), ("kind=", "--must must read KEY=VALUE"),
    ("kinds=bias", "a key of --must must be one of .* did you mean 'kind'"),
    ("kind=bias,kind=lora", "must say kind once"),
    ("layers=some", 'layers must read "3"'), ("form=cube", "form"),
    ("kind=adapter", "matches none")])
def test_a_pattern_that_says_nothing_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SPACE.matching(patterns([text], "--must")[0], "--must")


@pytest.mark.parametrize(("texts", "message"), [
    (["kind=adapter"], "--forbid must match PET of space test"),
    (["kind=*"], "--forbid must leave units of PET")])
def test_a_space_without_units_is_refused(texts: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Space("test", SPACE.sites, [tiny.rule("bias")], forbid=patterns(texts, "--forbid"))


# --- the command line ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("choose")
    with workplace(folder, tiny_folder):
        yield folder


@pytest.mark.parametrize("strategy", ["bilevel", "s3pet"])
def test_a_search_keeps_its_wishes(place: Path, strategy: str) -> None:
    out = place / strategy
    assert cli.main([*JOB, "--strategy", strategy, "--space", "nano", "--budget", "100", "--must",
                     "kind=bias,role=attention.query,layers=last 1", "--forbid", "role=ffn.*",
                     "--out", str(out)]) == 0
    spec = Spec.load(out)
    kept = {(e.kind, e.role, e.layer): e.kept for e in spec.entries}
    assert kept["bias", "attention.query", 1] == list(range(32))
    assert not [role for _, role, _ in kept if role.startswith("ffn")]
    assert 32 < spec.budget.used <= 100
    assert spec.provenance["forbid"] == ["role=ffn.*"]
    asked = json.loads((out / "settings.json").read_text())
    assert asked["must"] == ["kind=bias,role=attention.query,layers=last 1"]


@pytest.mark.parametrize(("words", "message"), [
    (["--must", "kind=bias"], "--must must fit in the budget: its"),
    (["--must", "role=ffn.in", "--forbid", "role=ffn.*"], "--must must match PET of space nano"),
    (["--forbid", "roles=ffn.*"], "a key of --forbid must be one of")])
def test_wishes_that_cannot_be_had_are_one_line(place: Path, capsys: Any, words: list[str],
                                                message: str) -> None:
    assert cli.main([*JOB, "--budget", "100", *words, "--out", str(place / "not")]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1

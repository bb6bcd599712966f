"""Vote: what most specs keep, exactly within the budget; only what can be voted on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from searchpet import cli
from searchpet.apply import apply
from searchpet.backbone import load_backbone
from searchpet.discover import discover
from searchpet.errors import InputError
from searchpet.space import Space
from searchpet.spec import BackboneId, BudgetUse, MaskRef, Spec
from searchpet.vote import vote
from tests.laws import families as tiny


@pytest.fixture(scope="module")
def place(tiny_folder: Path) -> tuple[Space, BackboneId, str]:
    """A space on the tiny backbone, and what a spec says of that."""
    backbone = load_backbone(str(tiny_folder), outputs=2, regression=False, seed=0)
    rules = [tiny.rule("lora", "atom", {"rank": 3}, role="attention.query"),
             tiny.rule("bias", "channel", role="ffn.in")]
    return (Space("test", discover(backbone.model), rules),
            BackboneId(**vars(backbone.identity)), str(tiny_folder))


def spec(place: tuple[Space, BackboneId, str], keep: torch.Tensor, task: str = "a") -> Spec:
    space, backbone, _ = place
    used = space.parameters(keep)
    return Spec(backbone=backbone, entries=space.entries(keep), provenance={"task": task},
                budget=BudgetUse(text=str(used), limit=used, used=used, slack=0,
                                 denominator=backbone.parameters))


def three(place: tuple[Space, BackboneId, str]) -> list[Spec]:
    return [spec(place, tiny.some(len(place[0]), seed, 0.3), f"task{seed}") for seed in range(3)]


def units(of: Spec) -> set[tuple[str, int]]:
    return {(e.key, c) for e in of.entries for c in
            (range(len(e.kept)) if e.kind == "lora" else e.kept)}


def test_the_most_voted_come_first_and_the_budget_is_exact(place: Any) -> None:
    specs = three(place)
    votes = Counter(unit for s in specs for unit in units(s))
    for budget in (1, 7, 40, 65, 130, 300):
        found = vote(specs, budget=str(budget), model=place[2])
        assert found.budget.used == budget  # channels fill what atoms leave
        kept = units(found)
        apart = [u for u in votes if "lora" not in u[0]]  # one price: no skipping
        least = min((votes[u] for u in kept if "lora" not in u[0]), default=9)
        assert all(votes[u] <= least for u in apart if u not in kept)
        model = load_backbone(place[2], outputs=2, regression=False, seed=0).model
        assert tiny.sizes(apply(model, found).searchpet.deltas.parameters()) == budget
    assert found.provenance["task"] == "task0,task1,task2"
    assert sum(found.provenance["votes"].values()) == sum(len(e.kept) for e in found.entries)


def test_a_vote_of_equals_is_that_spec_but_for_the_atoms_number(place: Any) -> None:
    one = three(place)[0]
    found = vote([one, one], model=place[2])
    assert units(found) == units(one) and found.budget.used == one.budget.used
    assert found.provenance["votes"] == {"2": len(units(one))}


def test_ties_go_to_the_place_with_more_votes(place: Any) -> None:
    space = place[0]
    first, second = [p for p in space.placements if p.kind == "bias"]
    many, few = (torch.zeros(len(space), dtype=torch.bool) for _ in range(2))
    many[second.start : second.start + 9] = True
    few[first.start : first.start + 3] = True
    found = vote([spec(place, many), spec(place, few)], budget="5", model=place[2])
    assert {e.path for e in found.entries} == {second.site.path}


def test_what_cannot_be_voted_on_is_refused(place: Any) -> None:
    a, b, _ = three(place)

    def refused(match: str, *specs: Spec, **more: Any) -> None:
        with pytest.raises(InputError, match=match):
            vote(specs, model=place[2], **more)

    refused("among two specs at least, but got 1", a)
    refused("give --budget", a, spec(place, tiny.some(len(place[0]), 9, 0.1)))
    for change in ({"revision": "other"}, {"config_hash": "other"}):
        moved = b.model_copy(update={"backbone": b.backbone.model_copy(update=change)})
        refused("searchpet transfer SPEC --model", a, moved, budget="9")
    head = b.budget.model_copy(update={"counts": "deltas and head"})
    refused("counts the head", a, b.model_copy(update={"budget": head}), budget="9")
    sparse = b.entries[0].model_copy(update={
        "mask": MaskRef(shape=(1,), sha256="0" * 64, count=1)})
    refused("prune and mask nothing", a, b.model_copy(update={"entries": (sparse,)}), budget="9")
    pruning = b.entries[0].model_copy(update={"kind": "heads"})
    refused("prune and mask nothing", a, b.model_copy(update={"entries": (pruning,)}), budget="9")
    far = next(e for e in b.entries if e.kind == "bias").model_copy(update={"kept": [10**6]})
    refused("restore the file", a, b.model_copy(update={"entries": (far,)}), budget="9")
    refused("must buy at least one unit", a, b, budget="0")


def test_the_command_writes_a_new_file(place: Any, tmp_path: Path, capsys: Any) -> None:
    names = []
    for i, one in enumerate(three(place)):
        names.append(str(tmp_path / f"{i}.json"))
        one.save(names[-1])
    words = ["vote", *names, "--budget", "50", "--model", place[2], "--out",
             str(tmp_path / "new" / "shared.json")]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "of 3" in said and "50 of 50 parameters" in said
    assert Spec.load(tmp_path / "new" / "shared.json").budget.used == 50
    assert cli.main(words) == 2
    assert "--out must be a new file" in capsys.readouterr().err
    assert cli.main([*words[:-1], str(tmp_path / "b.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["provenance"]["strategy"] == "vote"

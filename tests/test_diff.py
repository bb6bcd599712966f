"""Diff: what only one keeps, and an overlap beside that of two random draws."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from searchpet import cli, diff
from searchpet.ask import Ask
from searchpet.backbone import load_backbone
from searchpet.diff import expected
from searchpet.discover import discover
from searchpet.errors import InputError
from searchpet.hosts import Hosts
from searchpet.inference import flops
from searchpet.limits import Keep, Limits, masks_of
from searchpet.pruning import Prune
from searchpet.searched import keep_of, space_of
from searchpet.space import Space
from searchpet.spec import BackboneId, BudgetUse, KeepUse, Spec
from tests.laws import families as tiny

RANKED = """
description = "atoms of rank 4 and channels"
[[rule]]
kind = "lora"
grain = "atom"
options = { rank = 4 }
[[rule]]
kind = "bias"
grain = "channel"
"""


@pytest.fixture(scope="module")
def place(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A space file with atoms and channels, its units on the tiny backbone, its identity."""
    file = tmp_path_factory.mktemp("spaces") / "ranked.toml"
    file.write_text(RANKED)
    backbone = load_backbone(str(tiny_folder), outputs=2, regression=False, seed=0)
    space = Ask(space=str(file)).on(discover(backbone.model))
    return space, BackboneId(**{**vars(backbone.identity), "name": str(tiny_folder)}), file


def spec(place: Any, keep: torch.Tensor, **made: Any) -> Spec:
    space, backbone, file = place
    used = space.parameters(keep)
    return Spec(backbone=backbone, entries=space.entries(keep),
                provenance={"space": str(file), "strategy": "bilevel", "units": len(space),
                            **made},
                budget=BudgetUse(text=str(used), limit=used, used=used, slack=0,
                                 denominator=backbone.parameters))


def by_name(found: Any) -> dict[str, Any]:
    return {o.of: o for o in found.overlap}


def test_a_spec_is_its_units_again(place: Any) -> None:
    keep = tiny.some(len(place[0]), 3, 0.2)
    one = spec(place, keep)
    space = space_of(one)
    assert space is not None and torch.equal(keep_of(one, space), keep)
    counted = keep_of(one, space, alike=True)
    assert int(counted.sum()) == int(keep.sum()) and not torch.equal(counted, keep)


def test_masks_are_their_units_again() -> None:
    model = tiny.model("bert")
    space = tiny.space(model, tiny.rule("bias", "channel", role="ffn.out"),
                       *tiny.every_mask())
    sites, units = space.sites, len(space)
    hosts = Hosts(sites, masks_of(space))
    cost = flops(sites, hosts, units, {}, 16)
    limits = Limits(space, 20, Keep("flops", "50%", 0.5 * cost.dense, cost))
    score = torch.rand(units, generator=torch.Generator().manual_seed(0))
    keep = limits.fill(score)
    one = tiny.spec_of(model, space, keep & ~space.prunes).model_copy(
        update={"entries": limits.entries(keep), "plan": limits.plan(keep)})
    again = keep_of(one, space)
    hidden = keep & ~again  # what hangs on a layer or sublayer that goes is said by that alone
    assert not bool((again & ~keep).any())
    assert {space.placements[i].kind for i in space.owner[hidden].tolist()} <= {
        "heads", "neurons", "sublayers", "ranks"}


def test_a_diff_counts_what_only_one_keeps(place: Any) -> None:
    space = place[0]
    first, second = (tiny.some(len(space), seed, 0.1) for seed in (0, 1))
    found = diff(spec(place, first), spec(place, second))
    one, two = (keep_of(spec(place, keep), space, alike=True) for keep in (first, second))
    units, parameters = by_name(found)["units"], by_name(found)["parameters"]
    assert (units.a, units.b, units.both) == (
        int(one.sum()), int(two.sum()), int((one & two).sum()))
    assert units.jaccard == units.both / int((one | two).sum())
    assert parameters.a == space.parameters(first) and parameters.b == space.parameters(second)
    assert parameters.both == space.parameters(one & two)
    assert sum(c.only_a for c in found.changes) == int((one & ~two).sum())
    assert sum(c.only_b for c in found.changes) == int((two & ~one).sum())
    assert [c.differs for c in found.changes] == sorted(
        (c.differs for c in found.changes), reverse=True)
    assert (found.a.positions, found.note) == (len(space.entries(first)), "")


def test_the_same_atoms_under_other_numbers_are_no_difference(place: Any) -> None:
    space = place[0]
    atoms = next(p for p in space.placements if p.kind == "lora")
    keeps = torch.zeros(2, len(space), dtype=torch.bool)
    keeps[0, atoms.start : atoms.start + 2] = True
    keeps[1, atoms.start + 2 : atoms.start + 4] = True
    found = diff(*(spec(place, keep) for keep in keeps))
    assert [o.jaccard for o in found.overlap] == [1.0, 1.0]
    assert [(c.only_a, c.both, c.only_b) for c in found.changes] == [(0, 2, 0)]


def test_chance_is_what_two_draws_give(place: Any) -> None:
    space = place[0]
    draw = torch.Generator().manual_seed(0)
    atoms = torch.tensor([p.kind == "lora" for p in space.placements])[space.owner]

    def drawn(lora: int, bias: int) -> torch.Tensor:
        keep = torch.zeros(len(space), dtype=torch.bool)
        for mine, count in ((atoms, lora), (~atoms, bias)):
            own = mine.nonzero().squeeze(-1)
            keep[own[torch.randperm(len(own), generator=draw)[:count]]] = True
        return keep

    chance = expected(space, drawn(16, 120), drawn(20, 60))
    sums = torch.zeros(2, 2)
    for _ in range(300):
        one, two = (keep_of(spec(place, drawn(*n)), space, alike=True)
                    for n in ((16, 120), (20, 60)))
        for row, worth in enumerate((torch.ones_like(space.cost), space.cost)):
            sums[row] += torch.tensor([float(worth[one & two].sum()),
                                       float(worth[one | two].sum())])
    for value, (both, either) in zip(chance, sums.tolist(), strict=True):
        assert value == pytest.approx(both / either, rel=0.06)


def test_removed_units_and_masks_are_compared(place: Any, tiny_folder: Path) -> None:
    _, backbone, file = place
    model = load_backbone(str(tiny_folder), outputs=2, regression=False, seed=0).model
    prune = Prune("flops", "50%", "prune/heads_neurons")
    space = Ask(space=str(file), prune=prune).on(discover(model))
    keeps = ~space.prunes.repeat(2, 1) | True
    heads = [p for p in space.placements if p.kind == "heads"]
    keeps[0, space.unit[heads[0].start : heads[0].start + 2]] = False
    keeps[1, space.unit[heads[0].start + 1 : heads[0].start + 2]] = False
    keeps[:, ~space.prunes] = False
    keeps[:, (~space.prunes).nonzero()[0]] = True
    found = []
    for keep in keeps:
        cost = flops(space.sites, Hosts(space.sites, masks_of(space)), len(space), {}, 16)
        limits = Limits(space, 10**6, Keep("flops", "50%", cost.dense, cost))
        base = spec((space, backbone, file), keep & ~space.prunes, masks=prune.masks)
        found.append(base.model_copy(update={
            "entries": limits.entries(keep), "plan": limits.plan(keep),
            "keep": KeepUse(measure="flops", text="50%", limit=1.0, used=1.0, dense=2.0)}))
    compared = diff(*found)
    removed = by_name(compared)["removed units"]
    assert (removed.a, removed.b, removed.both, removed.jaccard) == (2, 1, 1, 0.5)
    assert 0 < removed.chance < 0.1
    assert [(m.kind, m.kept_a, m.kept_b) for m in compared.masks] == [("heads", 0.5, 0.75)]


def test_without_a_common_space_coordinates_are_compared(place: Any) -> None:
    keep = tiny.some(len(place[0]), 0, 0.1)
    for other, why in (({"space": "nano", "units": 1}, "not here or has changed"),
                       ({"space": "gone"}, "gone is not here")):
        found = diff(spec(place, keep), spec(place, keep, **other))
        assert why in found.note
        assert [(o.of, o.jaccard, o.chance) for o in found.overlap] == [
            ("coordinates", 1.0, None), ("parameters", 1.0, None)]


def test_other_backbones_are_refused(place: Any) -> None:
    one = spec(place, tiny.some(len(place[0]), 0, 0.1))
    other = one.model_copy(update={"backbone": one.backbone.model_copy(
        update={"config_hash": "0" * 64, "name": "another"})})
    with pytest.raises(InputError, match="one architecture.*another.*transfer"):
        diff(one, other)


def test_the_command_prints_tables_or_json(place: Any, tmp_path: Path, capsys: Any) -> None:
    space = place[0]
    for seed in (0, 1):
        spec(place, tiny.some(len(space), seed, 0.1)).save(tmp_path / f"{seed}.json")
    words = ["diff", str(tmp_path / "0.json"), str(tmp_path / "1.json")]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    for word in ("by chance", "units", "only A", "attention.query", "layer by layer", "--all"):
        assert word in said
    assert cli.main([*words, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["overlap"][0]["of"] == "units" and values["a"]["hash"]
    assert cli.main([*words, "--all"]) == 0
    assert "--all" not in capsys.readouterr().out
    assert cli.main([*words[:2], str(tmp_path / "none.json")]) == 2
    assert "none.json is neither" in capsys.readouterr().err


def test_grain_is_part_of_a_space(place: Any) -> None:
    from searchpet.diff import same

    space: Space = place[0]
    other = Space(space.name, space.sites, [tiny.rule("lora", "module", {"rank": 4}),
                                            tiny.rule("bias", "channel")])
    assert same(space, space) and not same(space, other) and not same(space, None)
    assert replace(space.placements[0], grain="module") != space.placements[0]

"""Explain: scores, ranks and margins are the search's own, and what comes next is what it would
take next.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from searchpet import cli, explain
from searchpet.errors import InputError
from searchpet.limits import Limits
from searchpet.scored import FILE, read
from searchpet.searched import keep_of, space_of
from searchpet.spec import Spec
from tests.commands import workplace

JOB = ["search", "--model", "tiny", "--task", "films", "--steps", "6", "--batch-size", "8",
       "--max-length", "16", "--no-train", "--quiet", "--budget"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Path]:
    """A folder with runs: `one` and `two` (other seed) on two budgets, `small` prunes too."""
    folder = tmp_path_factory.mktemp("explain")
    with workplace(folder, tiny_folder):
        for name, words in (("one", ["100, 254"]), ("two", ["100, 254", "--seed", "1"]),
                            ("small", ["254", "--keep-flops", "60%"])):
            assert cli.main([*JOB, *words, "--out", name]) == 0
        yield folder


@pytest.fixture
def run(place: Path, tmp_path: Path) -> Path:
    """A run to be damaged."""
    return shutil.copytree(place / "one", tmp_path / "one")


@pytest.mark.parametrize("name", ["one", "one/budgets/100"])
def test_every_kept_unit_has_its_reasons(place: Path, name: str) -> None:
    spec = Spec.load(place / name)
    space, scores, found = space_of(spec), read(spec), explain(place / name)
    assert space is not None and scores is not None and scores.density is True
    keep = keep_of(spec, space)
    assert len(found.kept) == int(keep.sum()) and found.by == "score per parameter"
    assert sum(unit.cost for unit in found.kept) == spec.budget.used
    worth = scores.score / space.cost
    assert [u.worth for u in found.kept] == worth[keep].sort(descending=True).values.tolist()
    assert [u.rank for u in found.kept] == sorted(int((worth > w).sum()) + 1 for w in worth[keep])
    assert found.cut == float(worth[~keep].max())
    assert all(unit.margin == unit.worth - found.cut for unit in found.kept)
    assert {u.path for u in found.kept} == {entry.path for entry in spec.entries}


@pytest.mark.parametrize("name", ["one", "one/budgets/100"])
def test_what_comes_next_is_what_the_search_would_take(place: Path, name: str) -> None:
    spec = Spec.load(place / name)
    space, scores, found = space_of(spec), read(spec), explain(place / name)
    assert space is not None and scores is not None
    keep = keep_of(spec, space)
    more = Limits(space, spec.budget.limit * 11 // 10, must=keep).fill(scores.score, density=True)
    assert len(found.enters) == int((more & ~keep).sum()) > 0
    assert sum(u.cost for u in found.enters) == space.parameters(more) - spec.budget.used
    assert not [u for u in found.enters if u.kept] and all(u.kept for u in found.leaves)
    left = spec.budget.used - sum(u.cost for u in found.leaves)
    assert left <= spec.budget.limit * 9 // 10 and found.leaves


def test_masks_are_explained_too(place: Path) -> None:
    found = explain(place / "small")
    pruned = [unit for unit in found.masks if not unit.kept]
    assert pruned and {u.kind for u in found.masks} >= {"heads", "neurons"}
    ranks = [unit.rank for unit in found.masks]
    assert ranks == list(range(1, len(ranks) + 1))
    scores = [unit.score for unit in found.masks]
    assert scores == sorted(scores, reverse=True)
    assert sum(u.cost for u in found.kept) == found.used
    assert "masks are taken with what hangs on them" in found.notes[-1]


def test_how_often_a_unit_is_chosen_over_seeds(place: Path) -> None:
    found = explain(place / "one", [place / "two", place / "one"])
    one, two = (Spec.load(place / name) for name in ("one", "two"))
    space = space_of(one)
    assert space is not None
    both = int((keep_of(one, space) & keep_of(two, space)).sum())
    counts = [round(3 * unit.often) for unit in found.kept if unit.often is not None]
    assert len(counts) == len(found.kept) and counts.count(3) == both and set(counts) <= {2, 3}
    with pytest.raises(InputError, match="runs of the same space"):
        explain(place / "one", [place / "small"])


def test_a_spec_without_a_run_says_what_cannot_be_said(place: Path, run: Path, tmp_path: Path,
                                                       ) -> None:
    spec = Spec.load(place / "one")
    (run / FILE).unlink()
    found = explain(run)
    assert "no scores lie beside this spec" in found.notes[0]
    assert found.by == "" and found.enters == () and found.kept[0].score is None
    assert sum(unit.cost for unit in found.kept) == spec.budget.used
    made = {**spec.provenance, "space": "gone"}
    spec.model_copy(update={"provenance": made}).save(tmp_path / "gone.json")
    found = explain(tmp_path / "gone.json")
    assert "the space that this spec was chosen from" in found.notes[0]
    assert len(found.kept) == sum(len(entry.kept) for entry in spec.entries)
    with pytest.raises(InputError, match="--with must compare units"):
        explain(tmp_path / "gone.json", [place / "two"])


def test_a_choice_of_groups_has_no_margins(place: Path) -> None:
    assert cli.main([*JOB, "500", "--strategy", "random", "--out", "groups"]) == 0
    found = explain(place / "groups")
    assert found.by == "" and found.kept[0].margin is None and found.kept[0].score is not None
    assert "strategy random has not chosen unit by unit" in found.notes[0]


def edit(run: Path, change: Any, about: str | None = None) -> None:
    from safetensors import safe_open

    with safe_open(run / FILE, "pt") as file:
        meta = file.metadata()
    tensors = change(load_file(run / FILE))
    save_file(tensors, run / FILE, {"searchpet": about} if about is not None else meta)


@pytest.mark.parametrize(("change", "about", "message"), [
    (lambda t: {"score": t["score"]}, None, "must hold a score and a price"),
    (lambda t: {**t, "score": t["score"][1:].clone()}, None, "must hold a score and a price"),
    (lambda t: {**t, "score": t["score"] * torch.nan}, None, "must hold numbers"),
    (lambda t: {**t, "price": -t["price"]}, None, "must hold numbers"),
    (lambda t: t, "{}", "must say what its scores are of"),
    (lambda t: t, "", "must say what its scores are of")])
def test_damaged_scores_are_one_line(run: Path, capsys: Any, change: Any, about: str | None,
                                     message: str) -> None:
    edit(run, change, about)
    assert cli.main(["explain", str(run)]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    (run / FILE).write_bytes(b"no tensors")
    assert cli.main(["explain", str(run)]) == 2
    assert "must be a safetensors file" in capsys.readouterr().err


def test_scores_of_another_spec_are_not_taken(run: Path, place: Path) -> None:
    shutil.copy(place / "two" / FILE, run / FILE)
    assert "no scores lie beside this spec" in explain(run).notes[0]


def test_the_command_prints_tables_or_json(place: Path, tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["explain", "one", "--with", "two"]) == 0
    said = capsys.readouterr().out
    for word in ("chosen by score per parameter", "enters with 10% more budget", "--all",
                 "leaves with 10% less", "above the cut", "kept by, of 2"):
        assert word in said
    out = tmp_path / "why.json"
    assert cli.main(["explain", "one", "--json", "--out", str(out)]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values == json.loads(out.read_text()) and values["kept"][0]["rank"] >= 1
    assert cli.main(["explain", "one", "--out", str(out)]) == 2
    assert "--out must be a new file" in capsys.readouterr().err
    assert cli.main(["explain", "small", "--all"]) == 0
    assert "pruned, the best first" in capsys.readouterr().out

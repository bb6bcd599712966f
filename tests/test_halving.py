"""`train --sweep`: four values of tau, two of them halfway, one to the end, as if alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import searchpet
from searchpet import engine
from searchpet.errors import InputError
from searchpet.run import Event, RunFolder
from searchpet.session import Session
from searchpet.settings import Settings
from tests.commands import cut_off, workplace

COMMON: dict[str, Any] = {"model": "tiny", "task": "films", "steps": 12, "batch_size": 8,
                          "max_length": 16}
WORDS = ["--model", "tiny", "--task", "films", "--steps", "12", "--batch-size", "8",
         "--max-length", "16", "--quiet"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("halving")
    with workplace(folder, tiny_folder):
        engine.search(**{**COMMON, "steps": 2}, strategy="random:unit", budget="1%", controls=0,
                      out="found")
        yield folder


@pytest.fixture(scope="module")
def swept(place: Path) -> tuple[engine.Result, list[Event]]:
    events: list[Event] = []
    found = searchpet.train("found", **COMMON, sweep=True, out="swept", listener=events.append)
    return found, events


def test_it_takes_less_than_two_trainings_and_counts_right(swept: Any) -> None:
    result, events = swept
    found = result.values["sweep"]
    assert found["steps"] == len(events) <= 2 * 12
    assert found["trainings"] == pytest.approx(len(events) / 12, abs=1e-4)
    assert sorted(one["steps"] for one in found["tried"]) == [2, 2, 6, 6]
    assert found["seconds"] >= sum(one["seconds"] for one in found["tried"])
    assert result.values["tau"] == found["tau"]


def test_the_better_half_goes_on_and_the_best_of_it_wins(swept: Any) -> None:
    tried = swept[0].values["sweep"]["tried"]
    out = [one["score"] for one in tried if one["steps"] == 2]
    first = {}
    for one in tried:
        rung = json.loads((swept[0].path / f"sweep-{one['tau']:g}/until-2.json").read_text())
        first[one["tau"]] = rung["score"]
    on = [one for one in tried if one["steps"] == 6]
    assert min(first[one["tau"]] for one in on) >= max(out)
    won = swept[0].values["sweep"]["tau"]
    assert max(one["score"] for one in on) == next(o["score"] for o in on if o["tau"] == won)


def test_the_winner_is_what_its_tau_gives_alone(swept: Any) -> None:
    alone = searchpet.train("found", **COMMON, tau=swept[0].values["tau"], out="alone")
    assert alone.score == swept[0].score
    for name in ("delta.safetensors", "spec.json"):
        assert (alone.path / name).read_bytes() == (swept[0].path / name).read_bytes()
    own = json.loads((swept[0].path / "training.json").read_text())
    assert own["history"] == json.loads((alone.path / "training.json").read_text())["history"]
    assert not list(swept[0].path.rglob("*.checkpoint.safetensors"))


@pytest.mark.parametrize("reports", [5, 11, 20])  # in each rung, and after the choice
def test_a_sweep_that_was_killed_ends_the_same(swept: Any, place: Path, reports: int) -> None:
    words = ["train", "found", *WORDS, "--sweep", "--out", f"cut-{reports}"]
    done = cut_off(words, f"SIGKILL train {reports}", place)
    assert done.returncode == -9, done.stderr
    again = searchpet.train("found", **COMMON, sweep=True, out=f"cut-{reports}", resume=True)
    assert again.score == swept[0].score and again.values["tau"] == swept[0].values["tau"]
    same = (again.path / "delta.safetensors").read_bytes()
    assert same == (swept[0].path / "delta.safetensors").read_bytes()
    assert again.values["sweep"]["steps"] == swept[0].values["sweep"]["steps"]


def test_a_training_that_was_paused_stays_paused(place: Path) -> None:
    """Killed after the pause, before the score was noted: nothing is trained further."""
    events: list[Event] = []
    session = Session(Settings(**COMMON), events.append)
    once, again = (session.fit("head", RunFolder(place).sub("paused"), 0, until=4)
                   for _ in range(2))
    assert len(events) == 4 and once.score == again.score and once.history == again.history


def test_a_reference_is_swept_too(place: Path) -> None:
    found = searchpet.train(reference="head", **COMMON, sweep=True, out="head")
    assert found.values["sweep"]["tau"] == found.values["tau"]


def test_the_command_says_what_was_tried_and_what_it_cost(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from searchpet.cli import main

    assert main(["train", "found", *WORDS, "--sweep", "--out", "said"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "by validation, of 0.0167 (" in said and "after 6)" in said
    found = json.loads(Path("said/result.json").read_text())["sweep"]
    assert f"{found['steps']} steps in all, {found['trainings']:.2f} trainings, " in said
    assert 20 <= found["steps"] <= 22  # all of them, but for early stopping


@pytest.mark.parametrize(("more", "message"), [
    ({"steps": 5}, "--steps must be at least 6, but got 5"),
    ({"lr": 0.01}, "--lr replaces tau; drop one"),
])
def test_what_cannot_be_swept_is_one_line(
    place: Path, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        searchpet.train("found", **{**COMMON, **more}, sweep=True,
                        out=f"wrong-{next(iter(more))}")

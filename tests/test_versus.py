"""Methods of grids beside one of them: means, intervals, and what cannot be compared."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from searchpet.charts import methods
from searchpet.cli import main
from searchpet.errors import InputError
from searchpet.versus import against

SCORES = {  # task -> method -> score of each training
    "films": {"full": [0.9, 0.9], "mine": [0.8, 0.82, 0.84], "theirs": [0.7, 0.74, 0.78]},
    "books": {"full": [0.7, 0.7], "mine": [0.5, 0.5, 0.53], "theirs": [0.52, 0.54, 0.56]},
}


def table(folder: Path, scores: Any = SCORES, budget: float = 1e-4, **more: Any) -> Path:
    """results.jsonl of a grid; every training takes 10 s, every search of `mine` 5 s."""
    rows = [{"task": task, "budget": 1.0 if method == "full" else budget, "method": method,
             "structure_seed": 0, "seed": seed, "score": score, "metric": "accuracy",
             "split": "test", "trainable": 100, "tau": 0.1, "train_seconds": 10.0,
             "search_seconds": 5.0 if method == "mine" else 0.0, **more}
            for task, methods in scores.items() for method, found in methods.items()
            for seed, score in enumerate(found)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "results.jsonl"


def test_means_differences_and_costs(tmp_path: Path) -> None:
    found = {line.method: line for line in against([table(tmp_path)], "theirs")}
    mine = found["mine"]
    assert list(found) == ["full", "mine", "theirs"]  # by falling score
    assert mine.score == pytest.approx((0.82 + 0.51) / 2)
    assert mine.difference == pytest.approx(((0.82 - 0.74) + (0.51 - 0.54)) / 2)
    assert (mine.ahead, mine.shared, mine.tasks, mine.trainings) == (1, 2, 2, 6)
    assert mine.retained == pytest.approx(mine.score / 0.8)
    assert mine.cost == pytest.approx(1.5) and found["theirs"].cost == 1
    assert found["theirs"].difference is None


def test_on_one_task_the_interval_is_welchs(tmp_path: Path) -> None:
    """scipy's t-test with unequal variances computes the expected interval."""
    scores = {"films": SCORES["films"]}
    mine = next(line for line in against([table(tmp_path, scores)], "theirs")
                if line.method == "mine")
    test = stats.ttest_ind(scores["films"]["mine"], scores["films"]["theirs"], equal_var=False)
    expected = test.confidence_interval(0.95)
    assert (mine.low, mine.high) == pytest.approx((expected.low, expected.high))


def test_the_interval_holds_the_truth_as_often_as_it_says(tmp_path: Path) -> None:
    """Three trainings a cell, three tasks of different noise: 95 % of 400 intervals, give or take
    three standard errors, hold the true difference, 0.1.
    """
    rng = stats.norm(0, 1)
    draws = rng.rvs(size=(400, 3, 2, 3), random_state=0)
    held = 0
    for number, tasks in enumerate(draws):
        scores = {f"t{i}": {"mine": list(0.6 + 0.02 * (i + 1) * cells[0]),
                            "theirs": list(0.5 + 0.01 * cells[1])}
                  for i, cells in enumerate(tasks)}
        line = next(one for one in against([table(tmp_path / str(number), scores)], "theirs")
                    if one.method == "mine")
        assert line.low is not None and line.high is not None
        held += line.low <= 0.1 <= line.high
    assert abs(held / 400 - 0.95) <= 3 * (0.95 * 0.05 / 400) ** 0.5


def test_what_is_unknown_is_none(tmp_path: Path) -> None:
    scores = {"films": {"mine": [0.8], "theirs": [0.7, 0.8]}, "books": {"theirs": [0.5, 0.5]}}
    mine = next(line for line in against([table(tmp_path, scores)], "theirs")
                if line.method == "mine")
    assert mine.low is None and mine.high is None and mine.retained is None
    assert mine.difference == pytest.approx(0.05) and (mine.shared, mine.tasks) == (1, 1)


def test_every_budget_stands_alone_beside_the_references(tmp_path: Path) -> None:
    small = table(tmp_path / "small")
    large = table(tmp_path / "large", {t: {k: v for k, v in m.items() if k != "full"}
                                       for t, m in SCORES.items()}, budget=1e-2)
    found = against([small, large], "theirs")
    assert [(line.budget, line.method) for line in found] == [
        (budget, method) for budget in (1e-2, 1e-4) for method in ("full", "mine", "theirs")]


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table(tmp_path)
    page = tmp_path / "new" / "versus.md"
    assert main(["compare", str(tmp_path), "--against", "theirs", "--out", str(page)]) == 0
    said = capsys.readouterr().out
    assert "+0.0250" in said and "1 of 2" in said and "keep" not in said
    assert page.read_text().splitlines()[0].startswith("| budget | method | tasks | score |")
    assert main(["compare", str(tmp_path), "--against", "theirs", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[1]["method"] == "mine"


def test_the_command_draws(tmp_path: Path) -> None:
    table(tmp_path, {**SCORES, "plays": {"mine": [0.6]}})
    figure = tmp_path / "new" / "versus.svg"
    assert main(["compare", str(tmp_path), "--against", "theirs", "--out", str(figure)]) == 0
    text = figure.read_text()
    assert all(name in text for name in (
        ">mine<", ">full, 2 of 3<", ">theirs, 2 of 3<", ">ahead of theirs<", ">0.01%<"))


def test_a_row_of_the_figure_says_what_the_line_says(tmp_path: Path) -> None:
    lines = against([table(tmp_path)], "theirs")
    axes = methods([asdict(line) for line in lines], "theirs").axes
    assert [t.get_text() for t in axes[0].get_yticklabels()] == ["full", "mine", "theirs"]
    mine = lines[1]
    drawn = [list(line.get_xdata()) for line in axes[1].lines if line.get_ydata()[0] == 1]
    assert drawn == [[mine.difference], [mine.low, mine.high]]
    assert [line.get_xdata()[0] for line in axes[2].lines] == [1, 1.5, 1]
    with pytest.raises(InputError, match="needs one"):
        methods([], "theirs")


def test_pruning_has_a_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = {"films": {k: v for k, v in SCORES["films"].items() if k != "full"}}
    table(tmp_path, scores, keep=0.6)
    assert main(["compare", str(tmp_path), "--against", "theirs"]) == 0
    assert "60%" in capsys.readouterr().out


@pytest.mark.parametrize(("make", "message"), [
    (lambda f: [table(f / "a"), table(f / "b")], "different trainings"),
    (lambda f: [table(f / "a"), table(f / "b", {"films": {"new": [0.5]}}, metric="f1")],
     "one metric and split"),
    (lambda f: [f / "none"], "must exist"),
    (lambda f: [table(f / "a", {})], "must have rows"),
])
def test_what_cannot_be_compared(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        against(make(tmp_path), "theirs")


def test_another_method_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be one of full, mine, theirs, but got 'thiers'"):
        against([table(tmp_path)], "thiers")


@pytest.mark.parametrize(("more", "message"), [
    ((), "--against METHOD"), (("--out", "x.md"), "--out takes the table of --against")])
def test_tables_need_a_method(more: tuple[str, ...], message: str, tmp_path: Path,
                              capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(table(tmp_path)), *more]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and message in said

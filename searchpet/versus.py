"""Versus: the methods of grids against one of them, over the tasks that both were trained on.

The difference of two methods is the mean over tasks of the difference of their mean scores.  Its
interval is Welch's (1947, Biometrika 34, doi:10.1093/biomet/34.1-2.28): each task and method has a
variance of its own over its trainings, tasks are taken as they are.  No bootstrap: of the three
trainings that a cell has as a rule, resampling sees a variance that is a third too small.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from searchpet.errors import InputError, unknown
from searchpet.gridfile import REFERENCES
from searchpet.ledger import RESULT_KEY, Ledger

FULL = "full"  # what the share of a score is of
LEVEL = 0.95
Scores = dict[str, dict[str, list[float]]]  # method -> task -> score of each training


@dataclass(frozen=True)
class Versus:
    """A method at a budget; keep: of the FLOPs.

    tasks: those with trainings;  score: the mean over them of each one's mean.
    retained: that score / full fine-tuning's on these tasks; None where one of them has none.
    difference: mean of score - the reference's over `shared` tasks;  low, high: its interval, None
    where a cell of them has a single training.  ahead: the shared tasks with a higher mean.
    cost: (search + training seconds) / training seconds, over its trainings.
    """

    budget: float
    keep: float
    method: str
    tasks: int
    trainings: int
    score: float
    trainable: int
    retained: float | None
    difference: float | None
    low: float | None
    high: float | None
    ahead: int
    shared: int
    cost: float


def against(paths: Sequence[Path], reference: str) -> list[Versus]:
    """Every method of results.jsonl files, or of their folders, by falling budget and score.

    Methods without a budget are shown at each.  Raises InputError where a table is not there, the
    reference is not among the methods, tables hold the same training twice, or a task has several
    metrics.
    """
    rows = _rows(paths)
    names = {row["method"] for row in rows}
    if reference not in names:
        raise unknown("method", reference, sorted(names))
    found: list[Versus] = []
    places = {_place(row) for row in rows if row["method"] not in REFERENCES}
    for place in sorted(places, reverse=True) or [(1.0, 1.0)]:
        here = [row for row in rows if row["method"] in REFERENCES or _place(row) == place]
        scores = _scores(here)
        lines = [_line(place, name, scores, reference, [r for r in here if r["method"] == name])
                 for name in scores]
        found += sorted(lines, key=lambda line: (-line.tasks, -line.score))
    return found


def _place(row: Mapping[str, Any]) -> tuple[float, float]:
    """Budget and share of the FLOPs."""
    return row["budget"], row.get("keep", 1.0)


COLUMNS = ("budget", "keep", "method", "tasks", "score", "of full", "difference", "interval",
           "ahead on", "trainable", "cost")


def cells(lines: Sequence[Versus]) -> tuple[list[str], list[list[str]]]:
    """The lines as texts: columns, rows.  What says nothing, as in grids that do not prune, has
    no column.
    """
    rows = [[f"{100 * line.budget:.3g}%", f"{100 * line.keep:.3g}%", line.method, f"{line.tasks}",
             f"{line.score:.4f}", _text(line.retained, ".4f"), _text(line.difference, "+.4f"),
             f"{line.low:+.4f} to {line.high:+.4f}" if line.low is not None else "",
             f"{line.ahead} of {line.shared}" if line.shared else "", f"{line.trainable:,}",
             _text(line.cost, ".2f")] for line in lines]
    told = [i for i, column in enumerate(zip(*rows, strict=True))
            if any(column) and not (COLUMNS[i] == "keep" and set(column) == {"100%"})]
    return [COLUMNS[i] for i in told], [[row[i] for i in told] for row in rows]


def markdown(lines: Sequence[Versus]) -> str:
    """The lines as a table for a page."""
    columns, rows = cells(lines)
    return "".join(f"| {' | '.join(row)} |\n"
                   for row in (columns, ["---"] * len(columns), *rows))


def _text(value: float | None, form: str) -> str:
    return "" if value is None or math.isnan(value) else format(value, form)


def _rows(paths: Sequence[Path]) -> list[Mapping[str, Any]]:
    """The rows of all tables."""
    found: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    metrics: dict[str, tuple[str, str]] = {}
    for path in (p / "results.jsonl" if p.is_dir() else p for p in paths):
        if not path.is_file():
            raise InputError(f"a grid's table must exist, but {path} does not; run the grid")
        rows = Ledger(path, RESULT_KEY).rows()
        if not rows:
            raise InputError(f"a grid's table must have rows, but {path} has none; run the grid")
        if twice := sorted(map(str, found.keys() & rows.keys())):
            raise InputError(f"tables must hold different trainings, but {path} and one before it "
                             f"both have {twice[0]}")
        for row in rows.values():
            sort = (row["metric"], row["split"])
            if metrics.setdefault(row["task"], sort) != sort:
                raise InputError(f"a task must have one metric and split, but {row['task']} has "
                                 f"{' on '.join(sort)} and {' on '.join(metrics[row['task']])}")
        found |= rows
    return list(found.values())


def _scores(rows: Iterable[Mapping[str, Any]]) -> Scores:
    scores: Scores = {}
    for row in rows:
        scores.setdefault(row["method"], {}).setdefault(row["task"], []).append(row["score"])
    return scores


def _line(place: tuple[float, float], name: str, scores: Scores, reference: str,
          rows: Sequence[Mapping[str, Any]]) -> Versus:
    own, other, full = scores[name], scores.get(reference, {}), scores.get(FULL, {})
    shared = [] if name == reference else [task for task in own if task in other]
    pairs = [(own[task], other[task]) for task in shared]
    differences = [statistics.fmean(a) - statistics.fmean(b) for a, b in pairs]
    difference = statistics.fmean(differences) if pairs else None
    reach = _reach(pairs)
    ends = None if difference is None or reach is None else (difference - reach,
                                                             difference + reach)
    score = _mean(own, own)
    trained = sum(row["train_seconds"] for row in rows)
    searched = sum(row["search_seconds"] for row in rows)
    return Versus(
        *place, name, len(own), len(rows), score,
        round(statistics.fmean(row["trainable"] for row in rows)),
        score / _mean(full, own) if own.keys() <= full.keys() and _mean(full, own) > 0 else None,
        difference, ends and ends[0], ends and ends[1],
        sum(d > 0 for d in differences), len(shared),
        (trained + searched) / trained if trained else math.nan)


def _mean(scores: Mapping[str, Sequence[float]], tasks: Iterable[str]) -> float:
    """Over tasks, of the means over trainings."""
    return statistics.fmean(statistics.fmean(scores[task]) for task in tasks)


def _reach(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> float | None:
    """Half of the interval of the mean difference; None where a variance is unknown.

    The mean over T tasks of a - b has variance sum(s^2 / n) / T^2 over all cells; Welch's degrees
    of freedom are that sum squared over sum((s^2 / n)^2 / (n - 1)).
    """
    cells = [cell for pair in pairs for cell in pair]
    if not cells or min(map(len, cells)) < 2:
        return None
    parts = [statistics.variance(cell) / len(cell) for cell in cells]
    if sum(parts) == 0:
        return 0.0
    freedom = sum(parts) ** 2 / sum(part**2 / (len(cell) - 1)
                                    for part, cell in zip(parts, cells, strict=True))
    return float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(sum(parts)) / len(pairs)

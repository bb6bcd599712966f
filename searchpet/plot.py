"""Plot: all figures by name, as functions on specs and results, and from files.

    from searchpet import plot
    plot.save(plot.structure(searchpet.Spec.load("runs/mine")), "mine.svg")
    plot.save(plot.draw(["runs/a", "runs/b"]), "changes.pdf")
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from searchpet import trials
from searchpet.canvas import Figure, save
from searchpet.charts import Scored, budget, cost, front, transfer
from searchpet.curves import (
    Learning,
    learning,
    probabilities,
    record_of,
    search,
    shares,
    trainings_of,
)
from searchpet.errors import InputError, unknown
from searchpet.maps import changes, frequency, parameters, structure
from searchpet.run import RunFolder
from searchpet.shelf import at
from searchpet.spec import Spec

__all__ = ["FIGURES", "Learning", "Scored", "budget", "changes", "cost", "draw", "frequency",
           "front", "learning", "parameters", "probabilities", "save", "scores_of", "search",
           "shares", "structure", "transfer"]

TABLES = (".jsonl", ".csv")
REFERENCES = ("random", "random:unit", "full", "head", "full fine-tuning")


@dataclass(frozen=True)
class Kind:
    """A figure by name: how many inputs it takes, of what sort, and how it is drawn."""

    draw: Callable[[Sequence[Path], str | None], Figure]
    least: int
    most: int | None
    takes: str


def draw(inputs: Sequence[str | Path], figure: str | None = None, task: str | None = None,
         ) -> Figure:
    """A figure from files.  inputs: specs, folders of runs, results.jsonl or a CSV.

    figure: its name in FIGURES; by default what the inputs are made for: one spec its structure,
    two what changed, more how often they select the same; a table with a source and a target the
    transfer between tasks, another one the budget curve.  task: of a table with several.
    Raises InputError for what cannot be drawn so.
    """
    paths = [at(item) for item in inputs]
    for path in paths:
        if not path.exists():
            raise InputError(f"plot takes specs, folders of runs, or tables of results, but "
                             f"{path} is not there")
    name = figure or _default(paths)
    if name not in FIGURES:
        raise unknown("--figure", name, FIGURES)
    kind = FIGURES[name]
    if not kind.least <= len(paths) <= (kind.most or len(paths)):
        most = "" if kind.most is None else f" to {kind.most}" if kind.most > kind.least else ""
        more = " or more" if kind.most is None else ""
        raise InputError(f"figure {name} takes {kind.least}{most}{more} {kind.takes}, but got "
                         f"{len(paths)}")
    return kind.draw(paths, task)


def _default(paths: Sequence[Path]) -> str:
    if any(path.suffix in TABLES for path in paths):
        return "transfer" if "source" in _rows(paths[0])[0] else "budget"
    return ("structure", "changes")[len(paths) - 1] if len(paths) <= 2 else "frequency"


def scores_of(paths: Sequence[Path], task: str | None = None) -> tuple[list[Scored], str]:
    """What runs and tables of results say, of one task; and the name of the metric.

    Raises InputError for results that do not compare: of several tasks, metrics or splits.
    """
    found: list[tuple[tuple[str, ...], Scored]] = []
    for path in paths:
        if path.suffix in TABLES:
            rows = [(_about(row, path), _of_row(row, path)) for row in _rows(path)]
        else:
            values = RunFolder(path).result()
            rows = [(_about(values, path), one) for one in results(values, path)]
        found += [(about, one) for about, one in rows if task in (None, about[0])]
    sorts = sorted({about for about, _ in found})
    if not found:
        raise InputError(f"--task must be a task of the results, but none is of {task!r}")
    if len(sorts) > 1:
        raise InputError("scores in one figure must be of one task, metric and split, but got "
                         f"{'; '.join(' '.join(sort) for sort in sorts)}; choose with --task or "
                         "give fewer")
    name, metric, split = sorts[0]
    return [one for _, one in found], f"{metric} on {split}, {name}"


def results(values: Mapping[str, Any], path: Path) -> list[Scored]:
    """A run's result.json as scores: what was found, its controls, full fine-tuning.

    Raises InputError for figures that are no numbers.
    """
    found = [Scored(str(values["strategy"]), _count(values["trainable"], path),
                    _number(values["score"], path), values["strategy"] not in REFERENCES)]
    found += smaller(values, path)
    for control in values.get("controls") or ():
        found.append(Scored(str(control["name"]), _count(control["trainable"], path),
                            _number(control["score"], path), False))
    full = values.get("full_finetune")
    if full is not None and values["strategy"] != "full":
        found.append(Scored("full fine-tuning", _count(values["backbone"], path),
                            _number(full, path), False))
    return found


def smaller(values: Mapping[str, Any], path: Path) -> list[Scored]:
    """The smaller ones of the budgets that a run's search was for."""
    rows = values.get("budgets") or []
    if not isinstance(rows, list) or not all(
            isinstance(r, dict) and {"run", "trainable", "score"} <= r.keys() for r in rows):
        raise InputError(f"budgets of a result must have a run, trainable and a score each, but "
                         f"those of {path} have not")
    return [Scored(str(values["strategy"]), _count(row["trainable"], path),
                   _number(row["score"], path)) for row in rows if row["run"] != "."]


def _about(row: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    try:
        return str(row["task"]), str(row["metric"]), str(row["split"])
    except KeyError as error:
        raise InputError(f"a result must have {error}, but one of {path} has not") from error


def _of_row(row: Mapping[str, Any], path: Path) -> Scored:
    """A line of results.jsonl; what keeps a part of the backbone is a method of its own."""
    try:
        name, kept = str(row["method"]), _number(row.get("keep", 1.0) or 1.0, path)
        return Scored(name if kept == 1 else f"{name}, keep {kept:.0%}",
                      _count(row["trainable"], path), _number(row["score"], path),
                      name not in REFERENCES)
    except KeyError as error:
        raise InputError(f"a result must have {error}, but one of {path} has not") from error


def _number(value: Any, path: Path) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"results must be numbers, but {path} has {str(value)[:40]!r}")
    return number


def _count(value: Any, path: Path) -> int:
    return max(1, round(_number(value, path)))


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a table.  A torn last line of JSON Lines does not count.

    Raises InputError for a file without rows, or with what are none.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".csv":
        rows: list[Any] = list(csv.DictReader(text.splitlines()))
    else:
        try:
            *lines, last = text.split("\n")
            rows = [json.loads(line) for line in lines if line.strip()]
            with contextlib.suppress(ValueError):
                rows += [json.loads(last)]
        except ValueError as error:
            raise InputError(f"{path} must hold one result per line, but: {error}") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"a table of results must have rows, but {path} has none")
    return rows


def _transfers(paths: Sequence[Path], task: str | None) -> Figure:
    """Rows with source, target and score; or those of a grid whose methods are `from TASK` (`on`
    in its file), other methods by their own names.  Raises InputError for several splits or
    metrics of one target.
    """
    rows = [row if "source" in row or "method" not in row else
            {**row, "source": str(row["method"]).removeprefix("from "), "target": row.get("task")}
            for path in paths for row in _rows(path)]
    rows = [row for row in rows if task in (None, row.get("target"))]
    for target in sorted({str(row.get("target")) for row in rows}):
        sorts = {(row.get("budget"), row.get("metric"), row.get("split"))
                 for row in rows if row.get("target") == target}
        if len(sorts) > 1:
            raise InputError("a transfer matrix must have one budget, metric and split for each "
                             f"task, but {target} has {len(sorts)} of them; give a table of one")
    return transfer(rows)


def _of_spec(drawn: Callable[[Spec], Figure]) -> Callable[[Sequence[Path], str | None], Figure]:
    return lambda paths, task: drawn(Spec.load(paths[0]))


def _of_scores(drawn: Callable[[Sequence[Scored], str], Figure],
               ) -> Callable[[Sequence[Path], str | None], Figure]:
    return lambda paths, task: drawn(*scores_of(paths, task))


def _learning(paths: Sequence[Path], task: str | None) -> Figure:
    folder = RunFolder(paths[0])
    values = folder.read_json("result.json") if folder.has("result.json") else {}
    metric = values.get("metric", "score") if isinstance(values, dict) else "score"
    return learning(trainings_of(folder), str(metric))


def _front(paths: Sequence[Path], task: str | None) -> Figure:
    return front(*trials.points(*trials.look(str(paths[0]), None)))


RUN, SPECS, RESULTS = "run", "specs or runs", "runs or tables of results"
FIGURES: dict[str, Kind] = {
    "structure": Kind(_of_spec(structure), 1, 1, "spec or run"),
    "parameters": Kind(_of_spec(parameters), 1, 1, "spec or run"),
    "changes": Kind(lambda paths, task: changes(*map(Spec.load, paths)), 2, 2, SPECS),
    "frequency": Kind(lambda paths, task: frequency([Spec.load(p) for p in paths]), 2, None,
                      SPECS),
    "probabilities": Kind(lambda paths, task: probabilities(record_of(RunFolder(paths[0]))), 1, 1,
                          RUN),
    "shares": Kind(lambda paths, task: shares(record_of(RunFolder(paths[0]))), 1, 1, RUN),
    "search": Kind(lambda paths, task: search(record_of(RunFolder(paths[0]))), 1, 1, RUN),
    "learning": Kind(_learning, 1, 1, RUN),
    "budget": Kind(_of_scores(budget), 1, None, RESULTS),
    "cost": Kind(_of_scores(cost), 1, None, RESULTS),
    "transfer": Kind(_transfers, 1, None, "tables with source, target and score, or of a grid"),
    "front": Kind(_front, 1, 1, "run of tune"),
}

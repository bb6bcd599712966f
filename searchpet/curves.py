"""Curves: figures of how a search and a training went, step by step."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from searchpet.canvas import (
    BLACK,
    BLUE,
    CYCLE,
    DASHES,
    GREY,
    MARKERS,
    SKY,
    VERMILLION,
    Axes,
    Figure,
    apart,
    drawn,
    logarithmic,
    sheet,
    short,
    thousands,
)
from searchpet.errors import InputError
from searchpet.outline import ordered
from searchpet.run import RunFolder
from searchpet.trace import Record
from searchpet.trace import read as read_record

FLOOR = 1e-6  # of a probability on a logarithmic axis
CONTROLS = "controls"
Lines = dict[int, dict[str, float]]  # step -> figures


@dataclass(frozen=True)
class Learning:
    """How one training went.  loss: (step, loss); scores: (step, validation score), each
    evaluation or, of a run from before those were kept, the best score so far.
    """

    name: str
    loss: tuple[tuple[int, float], ...]
    scores: tuple[tuple[int, float], ...]
    best: int | None


def logged(folder: RunFolder, stage: str) -> Lines:
    """The lines of log.jsonl on a stage.  A step that was taken twice counts once; a torn last
    line, and what is no line of a stage, do not count.
    """
    found: Lines = {}
    if folder.has("log.jsonl"):
        text = (folder.path / "log.jsonl").read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and row.get("stage") == stage and _whole(row.get("step")):
                found[row["step"]] = {
                    k: float(v) for k, v in row.items()
                    if k != "step" and isinstance(v, int | float) and math.isfinite(v)}
    return dict(sorted(found.items()))


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def record_of(folder: RunFolder) -> Record:
    """The record of a run's search; of an older run, what its log has.

    Raises InputError where neither says how probabilities moved.
    """
    found = read_record(folder)
    if found is None:
        lines = {s: v for s, v in logged(folder, "search").items() if "expected" in v}
        spec = folder.read_json("spec.json") if lines and folder.has("spec.json") else {}
        limit = spec.get("budget", {}).get("limit") if isinstance(spec, dict) else None
        found = Record.model_validate({
            "steps": max(lines, default=0), "limit": limit or 0, "groups": [],
            "points": [{"step": s, "groups": [], "entropy": 0.0, "hard": 0.0, **v}
                       for s, v in lines.items()]})
    if not found.points:
        raise InputError("a search must leave a record of its gates to be drawn, but "
                         f"{folder.path} has none: its strategy learns no gates; draw its "
                         "structure instead")
    return found


def learning_of(folder: RunFolder, name: str) -> Learning | None:
    """How a folder's training went; None where it left no word of that."""
    lines = logged(folder, "train")
    trained = folder.read_json("training.json") if folder.has("training.json") else {}
    trained = trained if isinstance(trained, dict) else {}
    scores = [(s, v["score"]) for s, v in lines.items() if "score" in v]
    history = trained.get("history")
    if isinstance(history, list) and all(isinstance(p, list) and len(p) == 2 for p in history):
        scores = [(int(s), float(v)) for s, v in history]
    loss = tuple((s, v["loss"]) for s, v in lines.items() if "loss" in v)
    best = trained.get("best_step")
    if not loss and not scores:
        return None
    return Learning(name, loss, tuple(scores), best if _whole(best) else None)


def trainings_of(folder: RunFolder) -> list[Learning]:
    """The training of a run, then those of its controls."""
    found = [learning_of(folder, "found")]
    for sub in sorted((folder.path / CONTROLS).glob("*/")):
        found.append(learning_of(RunFolder(sub), _named(sub.name)))
    return [one for one in found if one is not None]


def _named(folder: str) -> str:
    """A control's folder as it is called elsewhere: random:unit, the second one random:unit 2."""
    name, _, number = folder.rpartition("-")
    if not number.isdecimal():
        return folder
    return name.replace("-", ":") + (f" {int(number) + 1}" if int(number) else "")


@drawn
def search(record: Record) -> Figure:
    """Expected against hard parameters over the search, and how undecided its gates are.

    Expected: the sum of price times probability, which the search holds at the limit; hard: the
    parameters of what is more open than not.
    """
    figure, (above, below) = sheet(5.6, 4.4, 2, 1, sharex=True, height_ratios=[2.2, 1])
    steps = [point.step for point in record.points]
    sole = "o" if len(steps) == 1 else ""
    above.plot(steps, [p.expected for p in record.points], color=BLUE, label="expected",
               marker=sole)
    above.plot(steps, [p.hard for p in record.points], color=VERMILLION, linestyle="--",
               label="hard (p above one half)", marker=sole)
    if record.limit:
        above.axhline(record.limit, color=BLACK, linestyle=":", linewidth=1.2,
                      label=f"limit {record.limit:,}")
    above.set_ylabel("parameters")
    top = 1.3 * max([1, record.limit, *(max(p.expected, p.hard) for p in record.points)])
    above.set_ylim(-0.02 * top, top)  # what is 0 is seen as well
    thousands(above, "y")
    above.legend(loc="upper left", ncols=3, columnspacing=1.0, handlelength=1.8, fontsize=8.5)
    below.plot(steps, [p.entropy for p in record.points], color=GREY, marker=sole)
    below.set(xlabel="step of the search", ylabel="entropy, bits")
    below.set_ylim(0, 1.15 * max([1e-3, *(p.entropy for p in record.points)]))
    for axes in (above, below):
        axes.grid(axis="y")
    return figure


@drawn
def probabilities(record: Record) -> Figure:
    """Probabilities over the search, a panel for each role and each mask.

    Line: the median unit; band: from the tenth to the ninetieth of a hundred; dashed: the
    likeliest unit.  Raises InputError for a record without them.
    """
    if not record.groups:
        raise InputError("probabilities over time need the record of a search, which a run from "
                         "before it was kept does not have; search again")
    count = len(record.groups)
    across = min(4, count)
    down = -(-count // across)
    figure, axes = sheet(max(4.0, 2.3 * across) + 0.6, 1.55 * down + 1.1, down, across,
                         sharex=True, sharey=True)
    top = min(1.2, 2 * max(g[4] for point in record.points for g in point.groups) + FLOOR)
    steps = [point.step for point in record.points]
    for number, (own, which) in enumerate(zip(axes, _as_read(record), strict=False)):
        values = [[max(FLOOR, v) for v in point.groups[which][1:]] for point in record.points]
        low, middle, high, most = (list(column) for column in zip(*values, strict=True))
        sole = "o" if len(steps) == 1 else ""
        own.fill_between(steps, low, high, color=SKY, alpha=0.55, linewidth=0, label="10 to 90 %")
        own.plot(steps, middle, color=BLUE, label="median", marker=sole)
        own.plot(steps, most, color=VERMILLION, linestyle="--", linewidth=1.2, label="largest",
                 marker=sole)
        own.set_title(short(record.groups[which].name), fontsize=9)
        if top > 30 * _least(record):
            logarithmic(own, "y")
        own.set_ylim(max(FLOOR, 0.5 * _least(record)) if top > 30 * _least(record) else 0, top)
        own.grid(axis="y")
        if number + across >= count:  # the last of its column
            own.set_xlabel("step of the search", fontsize=9)
            own.tick_params(labelbottom=True)
    for own in axes[count:]:
        own.remove()
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3)
    figure.supylabel("probability of being kept", fontsize=10)
    return figure


def _as_read(record: Record) -> list[int]:
    """Numbers of the groups as a text passes their roles, masks last."""
    words = [group.name.split() for group in record.groups]
    rows = [("decoder" if "decoder" in own else "encoder", own[-1]) for own in words]
    place = {row: i for i, row in enumerate(ordered(rows))}
    return sorted(range(len(rows)), key=lambda i: (record.groups[i].masks, place[rows[i]]))


def _least(record: Record) -> float:
    return min(group[1] for point in record.points for group in point.groups)


@drawn
def shares(record: Record) -> Figure:
    """What each role is expected to hold of the parameters over the search.

    Raises InputError for a record without roles.
    """
    own = [i for i in _as_read(record) if not record.groups[i].masks]
    if not own:
        raise InputError("shares over time need the record of a search, which a run from before "
                         "it was kept does not have; search again")
    figure, (axes,) = sheet(6.4, max(3.4, 0.21 * len(own) + 1.2))
    steps = [point.step for point in record.points]
    totals = [sum(p.groups[i][0] for i in own) or 1.0 for p in record.points]
    ends, most = [], 0.0
    for number, i in enumerate(own):
        values = [p.groups[i][0] / t for p, t in zip(record.points, totals, strict=True)]
        ends.append(values[-1])
        most = max([most, *values])
        look = number // len(CYCLE)
        axes.plot(steps, values, color=CYCLE[number % len(CYCLE)], marker=MARKERS[number % 8],
                  linestyle=DASHES[look % len(DASHES)], markevery=max(1, len(steps) // 6),
                  markersize=4)
    top = 1.12 * most
    axes.set(xlabel="step of the search", ylabel="expected share of the parameters",
             ylim=(0, top))
    names = [(short(record.groups[i].name, 26), CYCLE[n % len(CYCLE)]) for n, i in enumerate(own)]
    _at_the_end(axes, steps[-1], ends, names, top)
    axes.grid(axis="y")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    return figure


def _at_the_end(axes: Axes, x: float, ends: Sequence[float], names: Sequence[tuple[str, str]],
                top: float) -> None:
    """Names beside the ends of their lines, moved apart."""
    least = top * 0.17 / axes.figure.get_figheight()  # type: ignore[union-attr]
    places = apart(ends, least, 0.3 * least)
    for end, place, (name, color) in zip(ends, places, names, strict=True):
        axes.annotate(name, (x, end), xytext=(1.03, place), textcoords=("axes fraction", "data"),
                      fontsize=8.5, va="center", annotation_clip=False,
                      arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.9})


@drawn
def learning(trainings: Sequence[Learning], metric: str = "score") -> Figure:
    """Learning curves: validation scores of all trainings, and the loss of the first if logged.

    Raises InputError where there is none.
    """
    if not trainings:
        raise InputError("learning curves need a training that left a log, but there is none; "
                         "train the spec again")
    first = trainings[0]
    if first.loss:
        figure, (above, below) = sheet(5.6, 4.8, 2, 1, sharex=True, height_ratios=[1.7, 1])
        below.plot(*zip(*first.loss, strict=True), color=CYCLE[0],
                   marker="o" if len(first.loss) == 1 else "")
        below.set_ylabel(f"loss, {short(first.name, 12)}")
    else:  # shorter than what lies between two lines of a log
        figure, (above,) = sheet(5.6, 3.4)
    for number, one in enumerate(trainings):
        if one.scores:
            above.plot(*zip(*one.scores, strict=True), color=CYCLE[number % len(CYCLE)],
                       marker=MARKERS[number % len(MARKERS)], markersize=4.5, label=one.name,
                       linestyle=DASHES[number % len(DASHES)])
    at: Mapping[int, float] = dict(first.scores)
    if first.best is not None and first.best in at:
        above.plot([first.best], [at[first.best]], marker="o", markersize=11, color=BLACK,
                   fillstyle="none", linestyle="none", label="kept checkpoint")
    above.set_ylabel(f"{short(metric, 20)}, validation")
    above.margins(y=0.12)
    figure.axes[-1].set_xlabel("step of the training")
    for axes in figure.axes:
        axes.grid(axis="y")
    handles, names = above.get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="outside lower center", ncols=min(3, len(names)))
    return figure

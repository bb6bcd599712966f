"""Charts: figures of scores, over budgets, costs, tasks and trials."""

from __future__ import annotations

import math
import statistics
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
    MIDDLE,
    VERMILLION,
    Axes,
    Figure,
    drawn,
    frame,
    logarithmic,
    sheet,
    short,
    thousands,
)
from searchpet.errors import InputError
from searchpet.knee import knee


@dataclass(frozen=True)
class Scored:
    """A trained structure: which method found it, what it costs, and what it reached."""

    name: str
    parameters: int
    score: float
    found: bool = True  # False: a control or a reference


@drawn
def budget(results: Sequence[Scored], metric: str = "score") -> Figure:
    """Score over budget, a line for each method, with the knee of each line of three or more.

    Points are means over what has the same method and parameters, bars their spread (sample
    standard deviation).  Raises InputError for fewer than two budgets.
    """
    methods = list(dict.fromkeys(one.name for one in results))
    curves = {name: _means([r for r in results if r.name == name]) for name in methods}
    if max([0, *map(len, curves.values())]) < 2:
        raise InputError("a budget curve needs results of one method at two budgets or more; "
                         "search again with another --budget and give both runs")
    figure, (axes,) = sheet(6.4, 4.2)
    for number, (name, points) in enumerate(curves.items()):
        color = CYCLE[number % len(CYCLE)]
        at = knee([(p[0], p[1]) for p in points])
        told = f", knee at {points[at][0]:,}" if at is not None else ""
        axes.errorbar([p[0] for p in points], [p[1] for p in points], [p[2] for p in points],
                      color=color, marker=MARKERS[number % 8], linestyle=DASHES[number % 4],
                      capsize=3, markersize=5.5, label=short(name) + told)
        if at is not None:
            axes.plot([points[at][0]], [points[at][1]], marker="o", markersize=14,
                      fillstyle="none", color=color, linestyle="none", gid=f"knee-{number}")
    logarithmic(axes, "x")
    axes.set(xlabel="trainable parameters", ylabel=short(metric, 44))
    axes.grid(alpha=0.3)
    axes.margins(0.1)
    figure.legend(loc="outside lower center", ncols=min(3, len(methods)))
    return figure


def _means(results: Sequence[Scored]) -> list[tuple[int, float, float]]:
    """(parameters, mean score, spread) by rising parameters."""
    at: dict[int, list[float]] = {}
    for one in results:
        at.setdefault(one.parameters, []).append(one.score)
    return [(cost, statistics.fmean(scores), statistics.stdev(scores) if len(scores) > 1 else 0.0)
            for cost, scores in sorted(at.items())]


@drawn
def cost(results: Sequence[Scored], metric: str = "score") -> Figure:
    """Score over cost: what was found beside the controls and references, each point named.

    Raises InputError where there is nothing.
    """
    if not results:
        raise InputError("a score over its cost needs a result, but got none")
    figure, (axes,) = sheet(6.0, 3.9)
    names = list(dict.fromkeys((one.name, one.found) for one in results))
    for number, (name, found) in enumerate(names):
        mine = [r for r in results if (r.name, r.found) == (name, found)]
        color = CYCLE[number % len(CYCLE)]
        axes.scatter([r.parameters for r in mine], [r.score for r in mine], s=90 if found else 60,
                     marker=MARKERS[number % 8], facecolor=color if found else "white",
                     edgecolor=color, linewidth=1.8, zorder=3, label=short(name))
    best = max((r.score for r in results if r.found), default=None)
    if best is not None and len(names) > 1:
        axes.axhline(best, color=MIDDLE, linestyle=":", linewidth=1, zorder=1)
    costs = [r.parameters for r in results]
    if max(costs) > 20 * min(costs):
        logarithmic(axes, "x")
    else:
        axes.set_xlim(0, 1.25 * max(costs))
        thousands(axes, "x")
    axes.set(xlabel="trainable parameters", ylabel=short(metric, 44))
    axes.margins(y=0.15)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=min(3, len(names)))
    return figure


@drawn
def transfer(rows: Sequence[Mapping[str, Any]], metric: str = "score") -> Figure:
    """Transfer between tasks: structures found on the row's task, trained on the column's.

    rows: {source, target, score}; several of a pair are averaged, their spread stands below.
    Framed: found on the task itself; where every task has that, colours are relative to it, since
    tasks have metrics of their own.  Raises InputError for rows that lack one of the three.
    """
    pairs: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        try:
            pairs.setdefault((str(row["source"]), str(row["target"])), []).append(
                float(row["score"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError("a transfer matrix needs rows with source, target and score, but "
                             f"one has {error!r}") from error
    if not pairs:
        raise InputError("a transfer matrix needs a row, but got none")
    targets = sorted({target for _, target in pairs})
    sources = sorted({source for source, _ in pairs}, key=lambda s: (s not in targets, s))
    figure, (axes,) = sheet(0.95 * len(targets) + 3.4, 0.62 * len(sources) + 2.0)
    own = {t: statistics.fmean(pairs[t, t]) for t in targets if (t, t) in pairs}
    relative = len(own) == len(targets) and all(own.values())
    values = [[statistics.fmean(pairs[s, t]) / (own[t] if relative else 1.0)
               if (s, t) in pairs else math.nan for t in targets] for s in sources]
    image = axes.imshow(values, cmap="cividis", aspect="auto")
    low, high = image.get_clim()
    for r, source in enumerate(sources):
        for c, target in enumerate(targets):
            shade = (values[r][c] - (low or 0.0)) / max(1e-12, (high or 1.0) - (low or 0.0))
            _score(axes, pairs.get((source, target), []), c, r, shade)
            if source == target:
                axes.add_patch(frame(c, r, 0.92, "white", f"own-{r}"))
    axes.set_xticks(range(len(targets)), [short(t, 18) for t in targets], rotation=30, ha="right",
                    rotation_mode="anchor")
    axes.set_yticks(range(len(sources)), [short(s, 24) for s in sources])
    axes.set(xlabel="trained on", ylabel="found on")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    label = "relative to the task's own" if relative else short(metric)
    figure.colorbar(image, ax=axes, label=label, pad=0.03)
    return figure


def _score(axes: Axes, scores: Sequence[float], x: float, y: float,
           shade: float) -> None:
    """A cell's number, dark on bright (a shade of 1) and bright on dark; the spread of several
    below it.
    """
    if not scores:
        axes.text(x, y, "–", ha="center", va="center", color=GREY)
        return
    mean = statistics.fmean(scores)
    spread = f"\n±{statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
    axes.text(x, y, f"{mean:.3f}{spread}", ha="center", va="center", fontsize=9,
              color="white" if shade < 0.55 else BLACK, gid=f"score-{y:g}-{x:g}")


@drawn
def front(points: Sequence[Mapping[str, float]], leading: Sequence[bool],
          names: Mapping[str, str]) -> Figure:
    """The score over each other metric of a study's trials; those on the Pareto front filled.

    points: of each trial, its values by metric;  leading: whether it is on the front, which of
    more than two metrics is that of all together;  names: metric -> the axis' name.
    """
    others = [name for name in names if name != "score"]
    figure, row = sheet(4.4 * len(others) + 0.8, 4.2, 1, len(others), sharey=True)
    for axes, name in zip(row, others, strict=True):
        best = sorted((p for p, on in zip(points, leading, strict=True) if on),
                      key=lambda p: p[name])
        rest = [p for p, on in zip(points, leading, strict=True) if not on]
        axes.scatter([p[name] for p in rest], [p["score"] for p in rest], s=34,
                     facecolor="white", edgecolor=MIDDLE, linewidth=1.4, label="other trials")
        axes.scatter([p[name] for p in best], [p["score"] for p in best], s=52, color=BLUE,
                     marker="D", zorder=3, label="on the front")
        if len(others) == 1:
            axes.step([p[name] for p in best], [p["score"] for p in best], where="post",
                      color=BLUE, linewidth=1.2, zorder=2)
        axes.set_xlabel(names[name])
        thousands(axes, "x")
        axes.locator_params(axis="x", nbins=5)
        axes.grid(alpha=0.3)
    row[0].set_ylabel(names["score"])
    handles, labels = row[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


@drawn
def methods(rows: Sequence[Mapping[str, Any]], reference: str) -> Figure:
    """Methods beside a reference, a row each, best first, a block for each budget: mean score,
    how far ahead of the reference with its interval, and what search and training cost.

    rows: {budget, keep, method, tasks, score, difference, low, high, cost}, sorted as they are
    drawn; without an interval a difference is an open marker.  Raises InputError for no rows.
    """
    if not rows:
        raise InputError("a figure of methods needs one, but got none")
    places = list(dict.fromkeys((row["budget"], row["keep"]) for row in rows))
    blocks = [[row for row in rows if (row["budget"], row["keep"]) == place] for place in places]
    figure, axes = sheet(9.2, 1.3 + 0.27 * len(rows) + 0.35 * len(blocks), len(blocks), 3,
                         sharex="col", gridspec_kw={"width_ratios": [3, 4, 2],
                                                    "height_ratios": [len(b) + 1 for b in blocks]})
    for number, (block, (budget, keep)) in enumerate(zip(blocks, places, strict=True)):
        score, ahead, cost = axes[3 * number : 3 * number + 3]
        y = range(len(block))
        for row, at in zip(block, y, strict=True):
            own = row["method"] == reference
            color, marker = (VERMILLION, "D") if own else (BLUE, "o")
            score.plot([row["score"]], [at], marker=marker, color=color)
            cost.plot([row["cost"]], [at], marker=marker, color=color)
            known = row["low"] is not None
            if row["difference"] is not None:
                ahead.plot([row["difference"]], [at], marker=marker, color=color,
                           markerfacecolor=color if known else "white", gid=f"{number}-{at}")
            if known:
                ahead.plot([row["low"], row["high"]], [at, at], color=color)
        most = max(row["tasks"] for row in block)
        score.set_yticks(y, [_method(row, most) for row in block])
        ahead.axvline(0, color=VERMILLION, linestyle=":", linewidth=1.2, zorder=1)
        for each in (score, ahead, cost):
            each.set_ylim(len(block) - 0.4, -0.6)
            each.grid(axis="x", alpha=0.3)
            each.tick_params(axis="y", length=0, labelleft=each is score)
        kept = "" if keep == 1 else f", {100 * keep:.3g}% of the FLOPs"
        score.set_title(f"{100 * budget:.3g}%{kept}", loc="left")
        for each in (score, ahead):
            each.locator_params(axis="x", nbins=5)
    if max(row["cost"] for row in rows) > 20:
        logarithmic(axes[-1], "x")
    else:
        axes[-1].set_xlim(0, 1.1 * max(row["cost"] for row in rows))
    for each, name in zip(axes[-3:], ("score, mean over tasks", f"ahead of {short(reference)}",
                                      "cost, in trainings"), strict=True):
        each.set_xlabel(name)
    return figure


def _method(row: Mapping[str, Any], most: int) -> str:
    """A row's name; on how many tasks it was trained, where that is not all."""
    return short(row["method"]) + ("" if row["tasks"] == most else f", {row['tasks']} of {most}")

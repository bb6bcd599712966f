"""The canvas: what all figures share.  Colours, hatches, sizes, and files in three formats.

Colours are those of Okabe and Ito (2008), which people with any colour vision tell apart; what
they say is said by a place, a hatch, a marker or a number as well.  Text stays text in SVG
and PDF.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
from matplotlib.axes import Axes as Axes  # others draw on what is made here
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure as Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import NullFormatter

from searchpet.errors import unknown
from searchpet.run import RunFolder

P = ParamSpec("P")
BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK = "#CC79A7", "#56B4E9", "#000000"
GREY, PALE, MIDDLE = "#595959", "#EFEFEF", "#A8A8A8"
DULL = "#8A8A8A"  # for their yellow, which thin lines on white paper lose
CYCLE = (BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, BLACK, DULL)
# lines alone: the dots of a hatch are half a megabyte in an SVG
HATCHES = ("", "////", "|||", "xxxx", "----", "\\\\\\\\", "++++", "//")
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
KINDS = ("lora", "bias", "scale", "adapter", "lowrank_adapter", "matrix")  # have a colour each
FORMATS = ("svg", "pdf", "png")
DOTS = 200  # per inch of a PNG
LONG = 30  # characters of a name; a longer one loses its middle
STYLE: Any = {
    "svg.fonttype": "none", "pdf.fonttype": 42, "font.size": 10, "axes.titlesize": 11,
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans", "Arial", "sans-serif"],
    "axes.labelsize": 10, "legend.fontsize": 9, "xtick.labelsize": 9, "ytick.labelsize": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": False,
    "hatch.linewidth": 0.9, "hatch.color": "white", "lines.linewidth": 1.8,
    "legend.frameon": False, "grid.alpha": 0.35, "grid.color": "#B0B0B0",
    "text.parse_math": False,  # names of tasks and roles are no formulas
    "svg.hashsalt": "searchpet", "axes.formatter.useoffset": False}


def drawn(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """A function that draws, in our style whatever the caller's is."""
    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
            return draw(*args, **kwargs)

    return styled


def sheet(width: float, height: float, rows: int = 1, columns: int = 1, **more: Any,
          ) -> tuple[Figure, list[Axes]]:
    """A figure of so many inches and its axes, row by row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **more)
    return figure, list(axes.flat)


def ink(kinds: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Kind -> (colour, hatch): a known kind has its own in every figure."""
    taken = {kind: KINDS.index(kind) for kind in kinds if kind in KINDS}
    free = [i for i in range(len(CYCLE)) if i not in taken.values()]
    for number, kind in enumerate(k for k in kinds if k not in taken):
        taken[kind] = free[number % len(free)]
    return {kind: (CYCLE[taken[kind]], HATCHES[taken[kind]]) for kind in kinds}


def boxes(axes: Axes, found: Iterable[tuple[float, float, float, float]], color: str,
          hatch: str = "", name: str = "", line: str = "none") -> None:
    """Rectangles (x, y, width, height) as one artist, which `name` finds again."""
    patches = [Rectangle((x, y), wide, high) for x, y, wide, high in found]
    if patches:
        own = PatchCollection(patches, facecolor=color, edgecolor=line or "none", linewidth=0.4,
                              hatch=hatch or None, label=name)
        own.set_hatchcolor("white" if line in ("none", "white") else line)
        axes.add_collection(own)


def frame(x: float, y: float, size: float, color: str, name: str) -> Rectangle:
    """An empty square around a point."""
    return Rectangle((x - size / 2, y - size / 2), size, size, fill=False, edgecolor=color,
                     linewidth=2.2, gid=name)


def swatch(color: str, hatch: str, name: str) -> Patch:
    """A legend's entry for boxes."""
    line = MIDDLE if color == "white" else "white"
    own = Patch(facecolor=color, hatch=hatch, label=name, edgecolor=line, linewidth=0.6)
    own.set_hatchcolor(line)
    return own


def logarithmic(axes: Axes, which: str) -> None:
    """A logarithmic `x` or `y` with numbers as people write them."""
    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    axis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def legend(figure: Figure, entries: Sequence[Any], title: str = "") -> None:
    """Below all axes: it never lies on what it explains.  As many columns as fit."""
    if entries:
        wide = 0.55 + 0.075 * max(len(str(entry.get_label())) for entry in entries)
        fits = max(1, int(figure.get_figwidth() / wide))
        figure.legend(handles=list(entries), loc="outside lower center", title=title or None,
                      ncols=min(fits, len(entries)), handlelength=1.6, columnspacing=1.2)


def headline(figure: Figure, text: str) -> None:
    """A title that begins at the figure's edge: a map may be narrower than its title."""
    figure.suptitle(text, x=0.01, ha="left", fontsize=11)


def thousands(axes: Axes, *which: str) -> None:
    """Numbers of an axis as 12,000."""
    for name in which:
        getattr(axes, f"{name}axis").set_major_formatter(lambda value, _: f"{value:,.6g}")


def short(name: str, most: int = LONG) -> str:
    """A name that fits: the middle of a long one is left out."""
    if len(name) <= most:
        return name
    return f"{name[: most // 2 - 1]}…{name[-(most - most // 2):]}"


def every(count: int, inches: float, digits: int = 2) -> int:
    """How many places between two labels so that they do not touch: 1, 2, 5, 10, ..."""
    fits = max(1.0, inches / (0.09 * digits + 0.08))
    return next(n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10**6) if count / n <= fits)


def apart(places: Sequence[float], least: float, low: float = -math.inf) -> list[float]:
    """Places of labels, moved as little as needed: `least` apart, none below `low`."""
    order = sorted(range(len(places)), key=places.__getitem__)
    found = list(places)
    for _ in range(200):
        moved = False
        for under, over in pairwise(order):
            if found[over] - found[under] < least * 0.999:
                middle = (found[under] + found[over]) / 2
                found[under], found[over] = middle - least / 2, middle + least / 2
                moved = True
        if not moved:
            break
    for rank, number in enumerate(order):
        found[number] = max(found[number], low + rank * least)
    return found


def picture(figure: Figure, form: str) -> bytes:
    """The figure as a file's content.  Raises InputError for a format that there is not."""
    if form not in FORMATS:
        raise unknown("a figure's format", form, FORMATS)
    out = io.BytesIO()
    about: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(form, {})
    with matplotlib.rc_context(STYLE):
        figure.savefig(out, format=form, dpi=DOTS, metadata=about)
    return out.getvalue()


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure; the ending says the format: svg, pdf or png.  Never half of it.

    Raises InputError for another ending.
    """
    target = Path(path)
    content = picture(figure, target.suffix.lower().lstrip(".") or "none")
    target.parent.mkdir(parents=True, exist_ok=True)
    RunFolder(target.parent).write_bytes(target.name, content)
    return target

"""Maps: figures of structures, roles x layers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from searchpet.board import FEW, INSET, KEPT, SIDE, TALL, Board, columns, height, width
from searchpet.canvas import (
    BLACK,
    BLUE,
    GREY,
    Figure,
    boxes,
    drawn,
    every,
    headline,
    ink,
    legend,
    sheet,
    short,
    swatch,
    thousands,
)
from searchpet.diff import Change, MaskChange, mask_changes, positions
from searchpet.errors import InputError
from searchpet.outline import Outline, Row, column, coordinates, label, outline
from searchpet.spec import Spec

MORE, LESS = BLACK, GREY


@drawn
def structure(spec: Spec | Outline) -> Figure:
    """Which kinds sit where and how much of each: roles x layers.

    A kind has a colour, a hatch and a place in its cell; a bar's height is the square root of its
    parameters.  Rows below say what prune masks keep; crossed cells are taken out.
    """
    one = _read(spec)
    wide = width(len(columns([one])))
    figure, (axes,) = sheet(wide + SIDE, height([one]) + 1.5)
    board = Board(axes, [one], wide)
    _fill(board, one, one.kinds, _most([one]))
    cells = Counter[Row]()
    for place in one.places:
        cells[place.row] += place.parameters
    board.totals([f"{cells[row]:,}" if cells[row] else "" for row in board.rows], one.unit)
    headline(figure, f"{one.total:,} {one.unit} in {len(one.cells()):,} positions, "
                     f"spec {one.title}")
    legend(figure, _entries(one.kinds, one), _scale(one, [one]))
    return figure


def _fill(board: Board, one: Outline, kinds: Sequence[str], most: int) -> None:
    """A structure's cells, bars and masks."""
    colors = ink(kinds)
    board.cells(one.gone())
    found = one.cells()
    for slot, kind in enumerate(kinds):
        bars = [board.bars(board.rows.index(row), layer, slot, len(kinds),
                          max(0.08, math.sqrt(held[kind] / most)))
                for (row, layer), held in found.items() if held[kind]]
        boxes(board.axes, bars, *colors[kind], name=kind)
    board.shares(one.shares, len(board.columns) <= FEW)


def _most(found: Sequence[Outline]) -> int:
    return max([1, *(count for one in found for held in one.cells().values()
                     for count in held.values())])


def _scale(one: Outline, found: Sequence[Outline]) -> str:
    return f"bars: square root of {one.unit}, the tallest {_most(found):,}"


def _entries(kinds: Sequence[str], *found: Outline) -> list[Any]:
    entries = [swatch(*pair, kind) for kind, pair in ink(kinds).items()]
    if any(one.shares for one in found):
        entries.append(swatch(KEPT, "", "kept, per cent"))
    if any(one.gone() for one in found):
        entries.append(swatch("white", "xxxx", "taken out"))
    return entries


def _comparable(specs: Sequence[Spec | Outline]) -> list[Outline]:
    """Structures whose coordinates mean the same.  Raises InputError for other ones."""
    found = [_read(spec) for spec in specs]
    for one in found[1:]:
        if one.home != found[0].home:
            raise InputError("structures must be on one architecture for their coordinates to be "
                             f"compared, but {found[0].title} and {one.title} are on two; draw "
                             "each on its own, or see searchpet transfer")
    return found


@drawn
def changes(first: Spec | Outline, second: Spec | Outline) -> Figure:
    """Two structures on one scale, and what the second has that the first has not.

    In the third map, bars up are coordinates that only the second keeps, bars down those that
    only the first does; at a mask, how much more the one keeps than the other.
    Raises InputError for structures on different backbones.
    """
    a, b = _comparable([first, second])
    if not set(a.rows) & set(b.rows):
        raise InputError("two structures must have a role in common to be compared, but "
                         f"{a.title} and {b.title} have none; draw each on its own")
    wide = width(len(columns([a, b])))
    beside = len(columns([a, b])) <= FEW
    size = ((3 * wide + SIDE + 0.6, height([a, b]) + 1.6) if beside
            else (wide + SIDE, 3 * (height([a, b]) + 0.7) + 0.9))
    figure, axes = sheet(*size, 1 if beside else 3, 3 if beside else 1)
    kinds = list(dict.fromkeys([*a.kinds, *b.kinds]))
    for own, one, name in zip(axes, (a, b), "AB", strict=False):
        board = Board(own, [a, b], wide)
        _fill(board, one, kinds, _most([a, b]))
        own.set_title(f"{name}: spec {one.title}\n{one.total:,} {one.unit}", loc="left")
    found = positions(a, b)
    board = Board(axes[2], [a, b], wide)
    _difference(board, found, mask_changes(a, b))
    both, only_a, only_b = (sum(c[i] for c in map(_counts, found)) for i in range(3))
    axes[2].set_title(f"kept by both: {both:,}\nonly A: {only_a:,}, only B: {only_b:,}",
                      loc="left")
    for own in axes[1:] if beside else ():
        own.set_yticklabels([])
    entries = [*_entries(kinds, a, b), swatch(MORE, "", "only B (up)"),
               swatch(LESS, "////", "only A (down)")]
    legend(figure, entries, _scale(a, [a, b]))
    return figure


def _counts(change: Change) -> tuple[int, int, int]:
    return change.both, change.only_a, change.only_b


def _difference(board: Board, found: Sequence[Change], masks: Sequence[MaskChange]) -> None:
    """Bars up and down from the middle of each cell: coordinates that one of the two keeps."""
    sides = Counter[tuple[Row, int]](), Counter[tuple[Row, int]]()
    for change in found:
        at = (change.part, change.role), change.layer
        sides[0][at] += change.only_b
        sides[1][at] += change.only_a
    most = max([1, *sides[0].values(), *sides[1].values()])
    board.cells(set())
    half = 0.5 - INSET
    for count, up in zip(sides, (True, False), strict=True):
        highs: Any = [(board.rows.index(row), layer, max(0.1, math.sqrt(number / most)))
                 for (row, layer), number in count.items() if number]
        highs += [(board.mask_row(board.masks.index(((m.part, m.role), m.kind))), m.layer,
                   abs(m.kept_b - m.kept_a)) for m in masks if (m.kept_b > m.kept_a) == up]
        boxes(board.axes, [(layer - half, y - high * half if up else y, 2 * half, high * half)
                          for y, layer, high in highs],
              MORE if up else LESS, "" if up else "////", "only B" if up else "only A")


@drawn
def parameters(spec: Spec | Outline) -> Figure:
    """How many parameters each layer and each role has, by kind."""
    one = _read(spec)
    rows, across = one.rows, columns([one])
    wide = max(4.2, min(9.0, 0.26 * len(across)))
    figure, (left, right) = sheet(wide + 5.2, max(3.2, TALL * len(rows) + 1.6), 1, 2,
                                  width_ratios=[wide, 5.2])
    colors = ink(one.kinds)
    below, behind = Counter[int](), Counter[Row]()
    for kind in one.kinds:
        by_layer, by_role = Counter[int](), Counter[Row]()
        for place in one.places:
            if place.kind == kind:
                by_layer[place.layer] += place.parameters
                by_role[place.row] += place.parameters
        look: Any = {"color": colors[kind][0], "hatch": colors[kind][1], "label": kind,
                "edgecolor": "white", "linewidth": 0.4}
        left.bar(across, [by_layer[c] for c in across], bottom=[below[c] for c in across],
                 width=0.82, **look)
        right.barh(range(len(rows)), [by_role[r] for r in rows], height=0.78,
                   left=[behind[r] for r in rows], **look)
        below += by_layer
        behind += by_role
    step = every(len(across), wide)
    shown = [c for c in across if c < 0 or c >= one.layers or c % step == 0]
    left.set_xticks(shown, [column(c, one.layers) for c in shown])
    left.set(xlabel="layer", ylabel=one.unit, xlim=(across[0] - 0.6, across[-1] + 0.6))
    right.set_yticks(range(len(rows)), [short(label(row, rows)) for row in rows])
    right.invert_yaxis()
    right.set_xlim(0, 1.2 * max([1, *behind.values()]))
    right.set_xlabel(one.unit)
    right.locator_params(axis="x", nbins=5)
    thousands(left, "y")
    thousands(right, "x")
    for number, row in enumerate(rows):
        share = f"{behind[row] / max(1, one.total):.0%}" if behind[row] else ""
        right.annotate(share, (behind[row], number), (6, 0), textcoords="offset points",
                       va="center", fontsize=8, color=GREY)
    left.grid(axis="y")
    left.set_axisbelow(True)
    headline(figure, f"{one.total:,} {one.unit}, spec {one.title}")
    legend(figure, [swatch(*colors[kind], kind) for kind in one.kinds])
    return figure


@drawn
def frequency(specs: Sequence[Spec | Outline]) -> Figure:
    """How often the same coordinates are selected, over the structures of several seeds.

    The map: of the coordinates that any of the structures keeps at a position, the share of the
    structures that keep one, on the mean: 1/N where no two agree, 1 where all do.  The bars: how
    many coordinates are kept by exactly k of N.  Raises InputError for fewer than two.
    """
    if len(specs) < 2:
        raise InputError(f"a selection frequency needs two specs or more, but got {len(specs)}; "
                         "search again with --seed 1 and give both")
    found = _comparable(specs)
    wide, ks = width(len(columns(found))), range(1, len(found) + 1)
    figure, (axes, bars) = sheet(wide + SIDE + 3.2, max(3.6, height(found) + 1.3), 1, 2,
                                 width_ratios=[wide + SIDE, 3.2])
    board = Board(axes, [replace(o, shares=()) for o in found], wide)
    counts = Counter(c for one in found for c in coordinates(one.places))
    table = _means(found, counts)
    values = [[table.get((row, layer), math.nan) for layer in board.columns] for row in board.rows]
    image = axes.imshow(values, cmap="cividis_r", vmin=0, vmax=1, aspect="auto", zorder=0, extent=(
        board.columns[0] - 0.5, board.columns[-1] + 0.5, len(board.rows) - 0.5, -0.5))
    if len(board.columns) <= FEW:
        for r, row in enumerate(values):
            for layer, value in zip(board.columns, row, strict=True):
                if not math.isnan(value):
                    axes.text(layer, r, f"{value:.0%}", ha="center", va="center",
                              fontsize=7, color="white" if value > 0.55 else BLACK)
    figure.colorbar(image, ax=axes, label="selection frequency", shrink=0.9, pad=0.02,
                    format="{x:.0%}")
    overlap = [len(a & b) / max(1, len(a | b)) for a, b in combinations(
        [coordinates(one.places) for one in found], 2)]
    headline(figure, f"{len(found)} structures; two of them share "
                     f"{sum(overlap) / len(overlap):.0%} of what they keep")
    times = Counter(counts.values())
    drawn_bars = bars.bar(ks, [times[k] for k in ks], color=BLUE, width=0.7)
    bars.bar_label(drawn_bars, [f"{times[k]:,}" for k in ks], fontsize=8, padding=2)
    bars.set(xlabel=f"kept by k of {len(found)}", ylabel="coordinates")
    bars.set_xticks([k for k in ks if (k - 1) % every(len(found), 2.4) == 0])
    bars.margins(y=0.12)
    thousands(bars, "y")
    return figure


def _means(found: Sequence[Outline], counts: Counter[tuple[str, str, str, int]],
           ) -> dict[tuple[Row, int], float]:
    """Position -> mean frequency of the coordinates that any structure keeps there."""
    at: dict[tuple[Row, int], set[tuple[str, str, str, int]]] = {}
    for one in found:
        for place in one.places:
            at.setdefault((place.row, place.layer), set()).update(coordinates([place]))
    return {where: sum(counts[c] for c in own) / len(own) / len(found)
            for where, own in at.items() if own}


def _read(spec: Spec | Outline) -> Outline:
    return spec if isinstance(spec, Outline) else outline(spec)

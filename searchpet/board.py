"""The board: axes with a cell for every role and layer, on which maps are drawn."""

from __future__ import annotations

from collections.abc import Sequence

from searchpet.canvas import MIDDLE, PALE, Axes, boxes, every, short
from searchpet.outline import Outline, Row, Share, column, label, mask_label, ordered

TALL, NARROW, WIDE = 0.27, 0.15, 0.46  # inches: a row; a column at least and at most
LEAST = 2.4  # inches of a map, however few columns it has
ROOM = 8.0  # inches that columns share while they are wide enough
SIDE = 3.2  # inches for names and totals
FEW = 16  # columns with numbers in their cells
INSET = 0.08  # of a cell, around what it holds
ENDS = ("norm.embedding", "norm.final")  # roles outside the blocks
KEPT, GONE = MIDDLE, "////"  # bright enough for a number on it


class Board:
    """Axes with a cell per row and layer.  `masks` are rows below those of PET."""

    def __init__(self, axes: Axes, found: Sequence[Outline], inches: float) -> None:
        self.axes = axes
        self.rows = ordered({row for one in found for row in one.rows})
        self.masks = masked(found)
        self.layers = max(one.layers for one in found)
        self.used = {(place.row, place.layer) for one in found for place in one.places}
        self.columns = columns(found)
        self._frame(inches)

    def _frame(self, inches: float) -> None:
        names = [short(label(row, self.rows)) for row in self.rows]
        names += [short(mask_label(row, kind, self.rows)) for row, kind in self.masks]
        self.axes.set_xlim(self.columns[0] - 0.5, self.columns[-1] + 0.5)
        self.axes.set_ylim(self.mask_row(len(self.masks) - 1) + 0.5 if self.masks
                           else len(self.rows) - 0.5, -0.5)
        self.axes.set_yticks([*range(len(self.rows)),
                              *map(self.mask_row, range(len(self.masks)))], names)
        step = every(len(self.columns), inches)
        shown = [c for c in self.columns if c < 0 or c >= self.layers or c % step == 0]
        if step > 1:  # `out` has more letters than a number
            shown = [c for c in shown if not self.layers - step < c < self.layers or
                     self.columns[-1] < self.layers]
        self.axes.set_xticks(shown, [column(c, self.layers) for c in shown])
        self.axes.set_xlabel("layer")
        self.axes.tick_params(length=0)
        for spine in self.axes.spines.values():
            spine.set_visible(False)

    def mask_row(self, number: int) -> float:
        """The y of a mask's row: a little apart from the rows of PET."""
        return len(self.rows) + 0.35 + number

    def cells(self, gone: set[tuple[Row, int]]) -> None:
        """An empty cell for every position; a crossed one for what is taken out."""
        size = 1 - INSET
        places = [(r, c) for r, row in enumerate(self.rows) for c in self.columns
                  if (row, c) in self.used or (0 <= c < self.layers and row[1] not in ENDS)]
        dead = {(self.rows.index(row), layer) for row, layer in gone}
        boxes(self.axes, [(c - size / 2, r - size / 2, size, size)
                          for r, c in places if (r, c) not in dead], PALE, name="cells")
        boxes(self.axes, [(c - size / 2, r - size / 2, size, size) for r, c in sorted(dead)],
              "white", "xxxx", name="gone", line=MIDDLE)

    def bars(self, row: int, layer: int, slot: int, slots: int, high: float,
             ) -> tuple[float, float, float, float]:
        """A bar in one of a cell's slots, `high` in [0, 1] of the cell, from its floor."""
        size = 1 - 2 * INSET
        wide = size / slots
        return (layer - size / 2 + slot * wide, row + size / 2 - high * size, wide, high * size)

    def totals(self, values: Sequence[str], title: str) -> None:
        """A number at the right end of each row of PET."""
        right = self.axes.secondary_yaxis("right")
        right.set_yticks(range(len(self.rows)), values)
        right.tick_params(length=0)
        right.spines["right"].set_visible(False)
        right.set_ylabel(title)

    def shares(self, found: Sequence[Share], numbers: bool) -> None:
        """The rows of masks: filled as far as something stays, in per cent where that fits."""
        known = {(s.row, s.kind, s.layer): s.kept for s in found}
        full, empty = [], []
        for number, (row, kind) in enumerate(self.masks):
            y = self.mask_row(number)
            for layer in range(self.layers):
                kept = known.get((row, kind, layer))
                if kept is not None:
                    x, _, wide, _ = self.bars(0, layer, 0, 1, 1)
                    size = 1 - 2 * INSET
                    full.append((x, y + size / 2 - kept * size, wide, kept * size))
                    empty.append((x, y - size / 2, wide, (1 - kept) * size))
                    if numbers:
                        self.axes.text(layer, y, f"{100 * kept:.0f}", ha="center", va="center",
                                       fontsize=7, gid=f"share-{number}-{layer}")
        boxes(self.axes, [b for b in full if b[3] > 0], KEPT, name="kept")
        boxes(self.axes, [b for b in empty if b[3] > 0], "white", "" if numbers else GONE,
              name="removed", line=MIDDLE)


def masked(found: Sequence[Outline]) -> list[tuple[Row, str]]:
    """Rows of masks: sublayers and layers first, then what is inside."""
    pairs = {(share.row, share.kind) for one in found for share in one.shares}
    outer = ("layers", "sublayers")
    return sorted(pairs, key=lambda p: (p[0][0] == "decoder", p[1] not in outer, p[1], p[0][1]))


def columns(found: Sequence[Outline]) -> list[int]:
    """Layers, with what stands before the first and after the last if anything does there."""
    used = [place.layer for one in found for place in one.places]
    layers = max(one.layers for one in found)
    return list(range(min([0, *used]), max([layers - 1, *used]) + 1))


def width(count: int) -> float:
    """Inches of a map of so many columns."""
    return max(LEAST, count * min(WIDE, max(NARROW, ROOM / count)))


def height(found: Sequence[Outline]) -> float:
    rows = len({row for one in found for row in one.rows})
    return TALL * (rows + len(masked(found)) + 0.5)

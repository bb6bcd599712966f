"""What the command line prints to make a result understood, from plain values."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from searchpet.diff import Change, Diff, Side
from searchpet.explain import STEP, Explained, Unit
from searchpet.views import duration, share, table

FEW = 12  # rows of a long table, where not all are asked for


def budgets(values: Mapping[str, Any]) -> Iterable[Any]:
    """The structures of several budgets that one search has found; nothing for one."""
    rows = values.get("budgets")
    if not rows:
        return
    yield f"one search, {len(rows)} structures, each part of the next"
    score = [values["metric"]] if rows[0]["score"] is not None else []
    yield table("budget", "run", "limit", "parameters", *score, left=2, rows=[
        [row["budget"] + (" (knee)" if row["budget"] == values["knee"] else ""), row["run"],
         row["limit"], row["used"], *([row["score"]] if score else [])] for row in rows])
    yield ""


def untrained(values: Mapping[str, Any], path: Path) -> Iterable[Any]:
    """The end of a search that trains nothing."""
    yield from budgets(values)
    yield (f"{values['used']:,} of {values['budget_limit']:,} parameters, found by "
           f"{values['strategy']} in {duration(values['seconds']['search'])}")
    yield f"\nthe structure: {path / 'spec.json'}"
    yield f"next: {shlex.join(['searchpet', 'show', str(path)])}"
    yield f"      {shlex.join(['searchpet', 'train', str(path)])}"


def difference(found: Diff, a: str, b: str, every: bool) -> Iterable[Any]:
    """Two structures: sizes, overlap beside chance, what differs by role and by layer."""
    yield f"both on {found.backbone}"
    yield table("", "", "spec", "strategy", "budget", "parameters", "coordinates", "positions",
                rows=[_side("A", a, found.a), _side("B", b, found.b)], left=5)
    yield ""
    yield table("kept", "A", "B", "both", "overlap", "by chance", rows=[
        [o.of, o.a, o.b, o.both, share(o.jaccard), "" if o.chance is None else share(o.chance)]
        for o in found.overlap])
    yield ""
    yield _changes("everywhere", _by_role(found.changes), layers=False)
    changed = [change for change in found.changes if change.differs]
    shown = changed if every else changed[:FEW]
    if shown:
        yield ""
        yield _changes("layer by layer, the most different first", shown, layers=True)
    yield from _rest(len(changed) - len(shown))
    if found.masks:
        yield ""
        yield table("mask", "at", "layer", "A keeps", "B keeps", left=2, rows=[
            [m.kind, f"{m.part} {m.role}".strip(), m.layer, share(m.kept_a), share(m.kept_b)]
            for m in (found.masks if every else found.masks[:FEW])])
        yield from _rest(0 if every else len(found.masks) - FEW)


def _side(name: str, where: str, side: Side) -> list[object]:
    return [name, where, side.hash[:8], side.strategy, side.budget, side.parameters,
            side.coordinates, side.positions]


def _rest(more: int) -> Iterable[str]:
    if more > 0:
        yield f"and {more:,} more; --all shows them"


def _changes(title: str, changes: Sequence[Change], layers: bool) -> Table:
    """Coordinates that one or both keep, and the parameters of each spec there."""
    where = ["layer"] if layers else []
    return table(title, "kind", *where, "only A", "both", "only B", "parameters A",
                 "parameters B", left=2, rows=[
                     [f"{c.part} {c.role}".strip(), c.kind, *([c.layer] if layers else []),
                      c.only_a, c.both, c.only_b, c.parameters_a, c.parameters_b]
                     for c in changes])


def _by_role(changes: Iterable[Change]) -> list[Change]:
    """All layers of a role and kind together."""
    found: dict[tuple[str, str, str], Change] = {}
    for change in changes:
        at = change.part, change.role, change.kind
        found[at] = found[at].plus(change) if at in found else change
    return [found[at] for at in sorted(found)]


def explained(found: Explained, every: bool) -> Iterable[Any]:
    """Why each unit is kept, what comes next and what goes first."""
    yield (f"{found.backbone}: {found.used:,} of {found.limit:,} parameters, found by "
           f"{found.strategy}, {found.hash[:8]}")
    if found.by:
        cut = "" if found.cut is None else f"; the best unit left out has {found.cut:.4g}"
        yield f"chosen by {found.by}{cut}"
    yield ""
    few = every or len(found.kept) <= 2 * FEW
    if few:
        yield _units(f"{len(found.kept):,} kept", found.kept, found)
    else:
        yield _units(f"{len(found.kept):,} kept, the first", found.kept[:FEW], found)
        yield ""
        yield _units("and the last", found.kept[-FEW:], found)
        yield from _rest(len(found.kept) - 2 * FEW)
    if found.by:
        for title, units in ((f"enters with {STEP}% more budget", found.enters),
                             (f"leaves with {STEP}% less", found.leaves)):
            yield ""
            shown = units if every else units[:FEW]
            yield _units(title, shown, found) if units else f"nothing {title}"
            yield from _rest(len(units) - len(shown))
    gone = [unit for unit in found.masks if not unit.kept]
    if found.masks:
        yield ""
        best = gone if every else gone[:FEW]
        yield _units(f"{len(gone):,} of {len(found.masks):,} pruned, the best first", best, found)
        yield from _rest(len(gone) - len(best))


def _units(title: str, units: Sequence[Unit], found: Explained) -> Table:
    """A row for each; columns that nobody has are left out."""
    columns: dict[str, Callable[[Unit], object]] = {
        "number": _numbers, "rank": lambda u: u.rank,
        "score": lambda u: _digits(u.score), "parameters": lambda u: u.cost or None,
        "per parameter": lambda u: _digits(u.worth) if found.by != "score" else None,
        "above the cut": lambda u: None if u.margin is None else f"{u.margin:+.3g}",
        f"kept by, of {found.runs}": lambda u: None if u.often is None else round(
            u.often * found.runs)}
    shown = {name: get for name, get in columns.items()
             if any(get(unit) not in (None, "") for unit in units)}
    return table(title, "kind", "layer", *shown, left=2, rows=[
        [f"{u.part} {u.role}".strip(), u.kind, u.layer, *(get(u) for get in shown.values())]
        for u in units])


def _numbers(unit: Unit) -> str:
    more = f" ({unit.coordinates:,} together)" if unit.coordinates > 1 else ""
    return f"{unit.coordinate}{more}"


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"

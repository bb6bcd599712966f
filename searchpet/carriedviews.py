"""What the command line prints of transfers, votes and shelves, from plain values."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from searchpet.spec import Spec
from searchpet.transfer import fates
from searchpet.views import share, table


def account(report: Mapping[str, Any]) -> Iterable[Any]:
    """The compatibility report: budgets, coordinates by role, what became of entries and why."""
    a, b = report["source"], report["target"]
    yield f"{a['backbone']}: {_spent(a)}"
    yield f"-> {b['backbone']}: {_spent(b)}"
    if keep := report["keep"]:
        yield (f"keeps {share(keep['used'] / keep['dense'])} of the blocks' {keep['measure']} "
               f"there (at most {keep['text']})")
    yield ""
    yield table("role", "kind", "kept in source", "kept there", left=2, rows=[
        [row["role"], row["kind"], row["source"], row["target"]] for row in report["roles"]])
    yield ""
    yield table("entries", "why", "number", left=2, rows=[list(row) for row in fates(report)])
    yield ""
    for note in report["notes"]:
        yield f"note: {note}"


def _spent(budget: Mapping[str, Any]) -> str:
    return (f"{budget['used']:,} of {budget['limit']:,} parameters, "
            f"{share(budget['limit'] / max(1, budget['denominator']))} of "
            f"{budget['denominator']:,}")


def carried(report: Mapping[str, Any], path: Path) -> Iterable[Any]:
    """The end of a transfer that trains nothing."""
    yield from account(report)
    yield f"\nthe structure: {path / 'spec.json'}; the report: {path / 'transfer.json'}"
    yield f"next: {shlex.join(['searchpet', 'train', str(path)])}"


def voted(spec: Spec, path: Path) -> Iterable[Any]:
    """The end of a vote."""
    made = spec.provenance
    yield f"{spec.backbone.name}: {_spent(spec.budget.model_dump())}"
    yield table("votes", "units", left=1, rows=[
        [f"{n} of {len(made['sources'])}", units] for n, units in made["votes"].items()])
    yield f"\nthe structure: {path}"
    yield f"next: {shlex.join(['searchpet', 'train', str(path)])} --task TASK"


def shelved(found: Sequence[tuple[str, Any]]) -> Iterable[Any]:
    """Cards and their shelves."""
    if not found:
        yield "no such specs; searchpet specs add RUN puts one on a shelf"
        return
    rows = [[_called(where, c.name), c.backbone, c.task or "", c.budget, c.used,
             f"{c.score:.4f} {c.metric} on {c.split}" if c.score is not None else ""]
            for where, c in found]
    yield table("spec", "backbone", "task", "budget", "used", "score", rows=rows, left=4)


def _called(where: str, name: str) -> str:
    """What a command takes for it."""
    if where == "searchpet":
        return f"searchpet:{name}"
    return f"{where.rstrip('/')}/{name}"

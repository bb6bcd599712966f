"""Results that several processes write: lines appended whole, work claimed by one at a time;
and the table of them.
"""

from __future__ import annotations

import fcntl
import json
import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from searchpet.errors import InputError

Row = dict[str, Any]

RESULT_KEY = ("task", "budget", "method", "structure_seed", "seed", "keep")
DEFAULTS = {"keep": 1.0}  # of what older lines, and those of grids that do not prune, leave out
SWEEP_KEY = (*RESULT_KEY, "tau")


class Ledger:
    """A JSON Lines file to which several processes append, one line per key."""

    def __init__(self, path: Path, key: Sequence[str]) -> None:
        self.path, self.key = path, key

    def rows(self) -> dict[tuple[Any, ...], Row]:
        """Lines by key.  The torn last line of a killed process does not count."""
        if not self.path.exists():
            return {}
        lines = self.path.read_bytes().split(b"\n")[:-1]
        try:
            found = [json.loads(line) for line in lines]
            return {tuple({**DEFAULTS, **row}[name] for name in self.key): row for row in found}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.path} must hold one result per line, but: {error!r}; repair "
                             "the line or delete it") from error

    def add(self, row: Row) -> None:
        """Append a line; a torn last line is cut off first."""
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def claim(folder: Path) -> Iterator[bool]:
    """Hold a folder; False while another process does.  A process that dies lets go."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "claim").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = True
        except BlockingIOError:
            mine = False
        yield mine


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder, once no other process does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "claim").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_table(folder: str | Path) -> str:
    """table.md from results.jsonl: mean and sample standard deviation over final trainings."""
    ledger = Ledger(Path(folder) / "results.jsonl", RESULT_KEY)
    groups: dict[tuple[str, float, float, str], list[Row]] = {}
    for row in ledger.rows().values():
        key = (row["task"], row["budget"], row.get("keep", 1.0), row["method"])
        groups.setdefault(key, []).append(row)
    if not groups:
        raise InputError(f"a table needs finished trainings, but {ledger.path} has none; run the "
                         "grid first")
    pruned = any(keep < 1 for _, _, keep, _ in groups)
    lines = [f"| task | budget | {'keep | ' if pruned else ''}method | score | spread | n | "
             "trainable | tau | search s |", "|---" * (9 + pruned) + "|"]
    for (task, budget, keep, method), rows in sorted(
            groups.items(), key=lambda g: (g[0][0], -g[0][1], -g[0][2], -_mean(g[1], "score"))):
        scores = [row["score"] for row in rows]
        spread = f"{statistics.stdev(scores):.4f}" if len(scores) > 1 else "-"
        lines.append(
            f"| {task} ({rows[0]['metric']}, {rows[0]['split']}) | {budget:.6g} | "
            f"{f'{keep:.3g} | ' if pruned else ''}{method} | "
            f"{_mean(rows, 'score'):.4f} | {spread} | {len(rows)} | "
            f"{round(_mean(rows, 'trainable')):,} | {rows[0]['tau']:g} | "
            f"{_mean(rows, 'search_seconds'):.0f} |")
    text = "\n".join(lines) + "\n"
    (Path(folder) / "table.md").write_text(text, encoding="utf-8")
    return text


def _mean(rows: list[Row], name: str) -> float:
    return statistics.fmean(row[name] for row in rows)

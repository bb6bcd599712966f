"""Rows of a file: JSON Lines, CSV or parquet, each row knowing the line that it came from."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from searchpet.errors import InputError

FORMATS = ("jsonl", "csv", "parquet")


@dataclass(frozen=True)
class Table:
    """Rows with the source that messages name.  lines: line (or row) number of each row."""

    source: str
    rows: Sequence[dict[str, Any]]
    lines: Sequence[int]

    @property
    def columns(self) -> tuple[str, ...]:
        """Names in order of first appearance."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row))

    def where(self, row: int) -> str:
        """`train.jsonl line 7`, for messages."""
        return f"{self.source} line {self.lines[row]}"

    def column(self, name: str) -> list[Any]:
        """All values of a column.  Raises InputError, naming the columns found, if it lacks."""
        if name not in self.columns:
            raise InputError(
                f"column {name!r} must be in {self.source}, but its columns are "
                f"{', '.join(map(repr, self.columns))}; rename one, or name the fields and the "
                "label in task.toml"
            )
        for i, row in enumerate(self.rows):
            if name not in row:
                raise InputError(f"column {name!r} must be in every row, but {self.where(i)} "
                                 f"has only {', '.join(map(repr, row))}; add it there")
        return [row[name] for row in self.rows]

    def texts(self, name: str) -> tuple[str, ...]:
        """All values of a text column.  Raises InputError for one that is not a string."""
        values = self.column(name)
        for i, value in enumerate(values):
            if not isinstance(value, str):
                raise InputError(f"column {name!r} must hold text, but {self.where(i)} has "
                                 f"{value!r}; make it a string")
        return tuple(values)


def read_table(path: Path) -> Table:
    """The rows of a file.  Raises InputError for what cannot be read, with the line, and for none.

    Blank lines of JSON Lines and CSV are skipped.
    """
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise InputError(f"data must be a {', '.join(readers)} file, but got {str(path)!r}")
    if not path.is_file():
        raise InputError(f"data file must exist, but there is no {str(path)!r}")
    try:
        table = readers[path.suffix](path)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} must be UTF-8, but byte {error.start} is not; "
                         "save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path} must be readable, but: {error.strerror or error}") from None
    if not table.rows:
        raise InputError(f"{path} must have at least 1 row, but has 0; add rows or remove it")
    return table


def _read_jsonl(path: Path) -> Table:
    rows, lines = [], []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path} line {number} must be JSON, but: {error}; "
                                 "write one object per line") from None
            if not isinstance(row, dict):
                raise InputError(f"{path} line {number} must be a JSON object, but got "
                                 f"{type(row).__name__}; write {{\"text\": ..., \"label\": ...}}")
            rows.append(row)
            lines.append(number)
    return Table(str(path), rows, lines)


def _read_csv(path: Path) -> Table:
    """All cells are strings; a quoted cell may hold line ends."""
    rows, lines = [], []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise InputError(f"{path} line 1 must name each column once, but got {header}")
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise InputError(
                        f"{path} line {reader.line_num} must have {len(header)} cells as the "
                        f"header, but has {len(cells)}; quote texts that hold commas"
                    )
                rows.append(dict(zip(header, cells, strict=True)))
                lines.append(reader.line_num)
        except csv.Error as error:
            raise InputError(f"{path} line {reader.line_num} must be CSV, but: {error}") from None
    return Table(str(path), rows, lines)


def _read_parquet(path: Path) -> Table:
    from pyarrow import ArrowException, parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except ArrowException as error:
        first = str(error).splitlines()[0]
        raise InputError(f"{path} must be a parquet file, but: {first}") from None
    return Table(str(path), rows, range(1, len(rows) + 1))

"""Results that several processes write: lines appended whole, work claimed by one at a time."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from searchpet.errors import InputError

Row = dict[str, Any]


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
            return {tuple(row[name] for name in self.key): row for row in found}
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

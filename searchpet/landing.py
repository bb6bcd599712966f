"""The folder of an export: it appears whole or not at all, and replaces nothing but an export."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from searchpet.errors import InputError

MANIFEST = "export.json"


def free(target: Path, same: dict[str, Any], overwrite: bool) -> None:
    """Raise InputError unless an export may be put there."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise InputError(f"--out must be a folder, but {target} is a file or a link")
    if not target.exists() or not any(target.iterdir()):
        return
    before = _manifest(target)
    if before is None:
        raise InputError(f"--out must be a new folder or an earlier export, but {target} holds "
                         "other files; name another")
    if before["run"] != same["run"] and not overwrite:
        raise InputError(f"--out must be a new folder or an export of the same run, but {target} "
                         "is that of another; add --overwrite or name another")


def _manifest(folder: Path) -> dict[str, Any] | None:
    """export.json of a folder that holds an export and nothing else; else None."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        known = {*found["files"], MANIFEST}
        whole = found["searchpet_export"] == 1 and "run" in found
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if whole and set(files(folder)) <= known else None


def files(folder: Path) -> dict[str, int]:
    """Bytes of each file, by its path inside."""
    return {path.relative_to(folder).as_posix(): path.stat().st_size
            for path in sorted(folder.rglob("*")) if path.is_file()}


@contextlib.contextmanager
def landing(target: Path) -> Iterator[Path]:
    """A folder beside the target that takes its place at the end, and goes if anything fails.

    What a killed export left there is cleared by the next.
    """
    whole = target.resolve()
    partial, old = (whole.with_name(f".{whole.name}.{end}") for end in ("partial", "old"))
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if whole.exists():  # `free` has said that it may go
            whole.rename(old)
        partial.rename(whole)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise

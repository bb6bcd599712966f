"""What went wrong, in one line: for wrong input and for what the machine ran out of."""

from __future__ import annotations

import errno
import os
import re
import shlex
from collections.abc import Sequence
from typing import TypeGuard

from searchpet import launch
from searchpet.errors import InputError, shown

RESUMABLE = ("search", "train", "transfer", "tune")


def explain(error: Exception, words: Sequence[str]) -> str | None:
    """The line for an error that is no bug, None for a bug.  words: the command line."""
    if isinstance(error, InputError):
        text = str(error)
    elif hasattr(error, "format_message"):  # the option parser's, for a wrong command line
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "searchpet"
        text = f"{error.format_message().rstrip('.')}; see {path} --help"
    elif _out_of_memory(error):
        text = ("memory must hold a batch and what is trained, but it ran out; try a smaller "
                f"--batch-size with --accumulate, or --max-length{continuation(words)}")
    elif (reason := _storage(error)) is not None:
        text = (f"a study's storage must answer to the end, but it stopped: {reason}; trials that "
                f"were under way will be run again{continuation(words)}")
    elif (reason := _system(error)) is not None:
        text = f"{reason}; what was written before is kept{continuation(words)}"
    else:
        return None
    return " ".join(text.split())


def continuation(words: Sequence[str]) -> str:
    """How to go on with a command that was cut off."""
    if words and words[0] in RESUMABLE:
        resumed = [*words, *([] if "--resume" in words else ["--resume"])]
        return f"; to continue: {shlex.join([*launch.program(), *map(shown, resumed)])}"
    if words and words[0] == "grid":
        return "; repeat the command to continue"
    return ""


def _out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text))


def _system(error: Exception) -> str | None:
    """What the system refused and where: disk full, permission denied, ..."""
    if isinstance(error, OSError):
        name = error.filename2 or error.filename  # of two, where it was to go
        where = f": {name}" if name else ""
        advice = "; free some disk space" if error.errno == errno.ENOSPC else ""
        return f"{error.strerror or error}{where}{advice}"
    rust = re.search(r"\(os error (\d+)\)$", str(error))  # as safetensors and tokenizers say it
    return _system(OSError(int(rust[1]), os.strerror(int(rust[1])))) if rust else None


def _storage(error: BaseException | None) -> str | None:
    """What a study's database said at last, where an error came of that."""
    while error is not None and not _of_storage(error):
        error = error.__cause__ or error.__context__  # Optuna stumbles over some of them
    if error is None:
        return None
    while _of_storage(error.__cause__):
        error = error.__cause__
    said: object = getattr(error, "details", None)  # gRPC's own text
    text = str(said() if callable(said) else getattr(error, "orig", None) or error)
    return text.strip().splitlines()[0] if text.strip() else repr(error)


def _of_storage(error: BaseException | None) -> TypeGuard[BaseException]:
    """Whether an error is one of the libraries that reach a database."""
    names = {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(error).__mro__}
    return bool(names & {("sqlalchemy", "SQLAlchemyError"), ("grpc", "RpcError"),
                         ("optuna", "StorageInternalError")})

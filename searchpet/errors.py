"""The one exception that means: the input is wrong, not the program."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence


class InputError(ValueError):
    """Bad input.  The message is one line: the law, the value, the way out.

    The command line prints it without a traceback and exits with code 2.
    """


class SlowWarning(UserWarning):
    """Right, but slower than it need be.  The command line prints it, as a line of its own."""


def unknown(what: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a name that is not in a list, with the nearest names."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return InputError(f"{what} must be one of {', '.join(names)}, but got {name!r}{hint}")


def listed(names: Sequence[str], most: int = 5) -> str:
    """Names in a row, the first few by name and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def shown(text: str) -> str:
    """An address, or a command line with one in it, without passwords: u:***@host."""
    text = re.sub(r"(://[^:/@\s]*):[^\s]*@", r"\1:***@", text)
    return re.sub(r"(\bpassword=)[^&\s'\"]*", r"\1***", text)

"""Patterns: units by where they sit and of which kind, in the words of a space's `select`.

    kind=bias,role=attention.*,layers=last 2
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from searchpet.errors import InputError, unknown
from searchpet.site import Site
from searchpet.spacefile import Select
from searchpet.spec import first_problem

KEYS = ("kind", *Select.model_fields)


@dataclass(frozen=True)
class Pattern:
    """text: as it was written;  kind: a glob;  select: of sites."""

    text: str
    kind: str
    select: Select

    def matches(self, site: Site, kind: str, depth: int) -> bool:
        """depth: number of blocks of the site's stack."""
        return fnmatch.fnmatchcase(kind, self.kind) and self.select.matches(site, depth)


def patterns(texts: Sequence[str] | None, option: str) -> tuple[Pattern, ...]:
    """Read what an option says, each time it is given.  Raises InputError for another form."""
    return tuple(_read(text, option) for text in texts or ())


def _read(text: str, option: str) -> Pattern:
    found: dict[str, str] = {}
    for word in text.split(","):
        name, sign, value = (part.strip() for part in word.partition("="))
        if not (sign and name and value):
            raise InputError(f"{option} must read KEY=VALUE,..., such as kind=bias,role=ffn.*, "
                             f"but got {text!r}")
        if name not in KEYS:
            raise unknown(f"a key of {option}", name, KEYS)
        if name in found:
            raise InputError(f"{option} must say {name} once, but got {text!r}; give the option "
                             "twice for either of two")
        found[name] = value
    kind = found.pop("kind", "*")
    try:
        return Pattern(text, kind, Select.model_validate(
            {name: (value,) if name == "form" else value for name, value in found.items()}))
    except ValidationError as error:
        raise InputError(f"{option} {text}: {first_problem(error)}") from error

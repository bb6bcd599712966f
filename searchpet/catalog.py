"""The directory is the registry: `get("deltas", "lora")` imports `searchpet/deltas/lora.py`.

A family is a package of this project; a member is a file in it, or what `add` was given from a
plug-in.  The member's value is the one public name that the family asks for (see FAMILIES).
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from searchpet.errors import unknown

# family -> (word for messages, attribute that a member's file must define)
FAMILIES = {
    "deltas": ("kind", "KIND"),
    "grains": ("grain", "grain"),
    "scores": ("score", "score"),
    "strategies": ("strategy", "search"),
    "tasks": ("task", "load"),
}
_added: dict[tuple[str, str], Any] = {}


def names(family: str) -> list[str]:
    """Sorted names of a family's members."""
    package = importlib.import_module(f"searchpet.{family}")
    files = {m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")}
    return sorted(files | {name for f, name in _added if f == family})


def get(family: str, name: str) -> Any:
    """The member of `family` called `name`.  Raises InputError with the nearest name on a miss."""
    word, attribute = FAMILIES[family]
    if (family, name) in _added:
        return _added[family, name]
    if name not in names(family):
        raise unknown(word, name, names(family))
    return getattr(importlib.import_module(f"searchpet.{family}.{name}"), attribute)


def about(family: str, name: str, attribute: str, default: Any = None) -> Any:
    """A further public name of a member's file, such as a strategy's MASKS, or the default."""
    member = get(family, name)
    if (family, name) in _added:
        return getattr(member, attribute, default)
    return getattr(importlib.import_module(f"searchpet.{family}.{name}"), attribute, default)


def describe(family: str, name: str) -> str:
    """First line of a member's documentation."""
    word, _ = FAMILIES[family]
    if (family, name) in _added:
        text = _added[family, name].__doc__
    else:
        text = importlib.import_module(f"searchpet.{family}.{name}").__doc__
    return (text or f"a {word} without a docstring").strip().splitlines()[0]


def add(family: str, name: str, member: Any) -> None:
    """Register a member from outside the package (a plug-in or a notebook)."""
    if family not in FAMILIES:
        raise unknown("family", family, FAMILIES)
    _added[family, name] = member

"""Architecture search for parameter-efficient tuning: the public names, loaded on first use."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from searchpet.diff import diff
    from searchpet.discover import discover
    from searchpet.engine import apply, load, merge
    from searchpet.errors import InputError
    from searchpet.explain import explain
    from searchpet.export import export
    from searchpet.jobs import search, train, transfer, tune
    from searchpet.serve import serve
    from searchpet.site import Site
    from searchpet.spec import Spec
    from searchpet.vote import vote

__version__ = "0.1.0"
__all__ = [
    "InputError",
    "Site",
    "Spec",
    "__version__",
    "apply",
    "diff",
    "discover",
    "explain",
    "export",
    "load",
    "merge",
    "search",
    "serve",
    "train",
    "transfer",
    "tune",
    "vote",
]

# public name -> the module that defines it
_HOME = {
    "InputError": "errors",
    "Site": "site",
    "Spec": "spec",
    "apply": "engine",
    "diff": "diff",
    "discover": "discover",
    "explain": "explain",
    "export": "export",
    "load": "engine",
    "merge": "engine",
    "search": "jobs",
    "serve": "serve",
    "train": "jobs",
    "transfer": "jobs",
    "tune": "jobs",
    "vote": "vote",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """Keeps `searchpet.train` the function: importing searchpet/train.py must not replace it."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

"""The commands: one function each, which `searchpet.cli` offers; and how they all answer.

Heavy imports happen inside the commands: `--help` answers at once.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from searchpet import launch
from searchpet import options as o
from searchpet.errors import InputError

if TYPE_CHECKING:
    from searchpet.engine import Result
    from searchpet.progress import Reporter

WIDE = 160  # columns of a table that goes into a file


def plug_in(modules: list[str]) -> list[str]:
    """Import the user's modules.  Raises InputError for one that is not there or fails."""
    for module in modules or ():
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            importlib.import_module(module)
        except InputError:
            raise
        except Exception as error:  # a user's module can fail in any way
            raise InputError(f"--plugin must name a module that can be imported, but {module}: "
                             f"{type(error).__name__}: {error}; --debug shows where") from error
    return modules


Plugin = Annotated[list[str], typer.Option(
    "--plugin", metavar="MODULE", help="Python module to import first; it may register kinds, "
    "grains, strategies, tasks.", rich_help_panel=o.RUN, callback=plug_in, is_eager=True)]


def reporter(quiet: bool, log: bool = True) -> Reporter:
    from searchpet.progress import Reporter

    return Reporter(quiet or not launch.leader(), log)


def answer(value: Any, as_json: bool, render: Callable[[Any], Iterable[Any]],
            notes: Iterable[str] = ()) -> None:
    """Print a command's result: on stdout as JSON or as `render` shows it, notes on stderr.

    Of several processes one prints.
    """
    if not launch.leader():
        return
    for note in notes:
        typer.echo(f"warning: {note}", err=True)
    if as_json:
        typer.echo(json.dumps(value, indent=1))
        return
    from rich.console import Console

    from searchpet import views

    console = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else WIDE)
    for part in render(views):
        console.print(part, markup=False)


def finish(result: Result, as_json: bool) -> None:
    """The end of `search` and `train`: the comparison, what was saved where, what to do next."""
    from searchpet import insightviews

    answer(result.values, as_json, lambda views: [
        *insightviews.budgets(result.values), *views.finished(result.values, result.path)],
           result.values["warnings"])

"""The command line: which commands there are, and how any of them ends."""

from __future__ import annotations

import os
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

import typer

from searchpet import launch
from searchpet.commands import (
    carry,
    choices,
    export,
    figures,
    insight,
    jobs,
    runs,
    specs,
    tune,
)
from searchpet.errors import SlowWarning
from searchpet.failures import continuation, explain
from searchpet.interrupts import polite

WRONG = 2  # exit code of wrong input
BROKEN = 1  # exit code of a bug that another process tells of
INTERRUPTED = 130  # exit code of Ctrl-C, as shells have it
QUIET = {  # what other libraries would print beside our own lines
    **dict.fromkeys(["TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"], "error"),
    "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Architecture search for parameter-efficient tuning: find where small tuning modules "
    "belong in a frozen transformer, under a hard parameter budget.")

for command in (jobs.search, jobs.train, runs.evaluate, runs.predict, runs.show, runs.verify,
                runs.compare, choices.sites, choices.space, choices.list_, jobs.grid, tune.tune,
                tune.trials, carry.transfer, carry.vote, export.export, figures.plot,
                figures.report, insight.diff, insight.explain):
    app.command(command.__name__.rstrip("_"))(command)
app.add_typer(specs.specs, name="specs")


def main(argv: Sequence[str] | None = None) -> int:
    """The console script.  Wrong input: one line on stderr and exit code 2; a bug: a traceback."""
    words = sys.argv[1:] if argv is None else list(argv)
    debug = "--debug" in words
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings(), _threads(debug), polite():
        if not debug:
            warnings.simplefilter("ignore")
            warnings.simplefilter("default", SlowWarning)
            warnings.showwarning = _warned
        try:
            launch.enter(words)
            code = typer.main.get_command(app).main(
                args=words, prog_name="searchpet", standalone_mode=False)
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except Exception as error:
            alone = launch.lost(error)
            line = f"{alone}{continuation(words)}" if alone else explain(error, words)
            with launch.speaking() as speaks:
                if speaks and line is None:
                    raise
                if speaks and debug:
                    traceback.print_exc()
                if speaks:
                    typer.echo(f"error: {line}", err=True)
            return WRONG if line else BROKEN
    if code == INTERRUPTED and launch.interrupted():
        typer.echo(f"interrupted{continuation(words)}", err=True)
    return int(code or 0)


def _warned(message: Warning | str, category: type[Warning], filename: str, lineno: int,
            file: TextIO | None = None, line: str | None = None) -> None:
    """A line without the place in the code."""
    typer.echo(f"warning: {message}", err=True)


@contextmanager
def _threads(debug: bool) -> Iterator[None]:
    """What explains itself in a thread, such as a database that does not hear the heartbeat, is
    left for the main one to say when it meets it too.
    """
    def ended(thread: threading.ExceptHookArgs) -> None:
        error = thread.exc_value
        if debug or not isinstance(error, Exception) or explain(error, ()) is None:
            before(thread)

    before, threading.excepthook = threading.excepthook, ended
    try:
        yield
    finally:
        threading.excepthook = before

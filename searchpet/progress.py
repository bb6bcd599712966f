"""Progress on stderr: a live line on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from searchpet.run import Event
from searchpet.views import duration

EVERY = 10.0  # seconds between the lines of a log


class Reporter:
    """A listener for the engine; a context manager, so that the terminal is left as it was.

    quiet: say nothing; log: say in lines, too, how stages go.
    """

    def __init__(self, quiet: bool = False, log: bool = True) -> None:
        self.quiet, self.log = quiet, log
        self.console = Console(stderr=True, highlight=False, emoji=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last: Event | None = None  # of the stage that runs
        self._said = 0.0
        if self.console.is_terminal and not quiet:
            wrapped = Column(no_wrap=False, overflow="fold")
            self._bar = Progress(
                BarColumn(12), TextColumn("{task.description} {task.fields[facts]}",
                                          table_column=wrapped),
                console=self.console, transient=True)

    def __enter__(self) -> Reporter:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._end()
        if self._bar:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self.quiet:
            self.console.print(text, markup=False, soft_wrap=True)

    def __call__(self, event: Event) -> None:
        if self.quiet:
            return
        now, last = time.monotonic(), self._last
        new = last is None or name(last) != name(event) or event.step <= last.step
        if new:
            self._end()
            self._said = now
        self._last = event
        if self._bar:
            self._show(self._bar, event, new)
        elif self.log and now - self._said >= EVERY and event.step < event.steps:
            self._said = now
            self.say(f"{name(event)} {facts(event)}")

    def _end(self) -> None:
        """A line on the stage that is over: it may have stopped before its last step."""
        if self._last is not None and self.log:
            self.say(f"{name(self._last)} {facts(self._last, over=True)}")
        self._last = None

    def _show(self, bar: Progress, event: Event, new: bool) -> None:
        if new:
            if self._task is not None:
                bar.remove_task(self._task)
            self._task = bar.add_task(name(event), total=event.steps, facts="")
        if self._task is not None:
            bar.update(self._task, completed=event.step, facts=facts(event))


def name(event: Event) -> str:
    """`bilevel search`, `train`."""
    return f"{event.job} {event.stage}".strip()


def facts(event: Event, over: bool = False) -> str:
    """Step, rate, time left, and whatever figures the stage reports."""
    parts = [f"{event.step}/{event.steps}", f"{event.rate:.1f} steps/s"]
    if over and event.step < event.steps:
        parts.append("stopped here")
    elif event.step < event.steps:
        parts.append(f"{duration(event.left)} left")
    for figure, value in event.figures.items():
        whole = figure in ("expected", "hard")
        parts.append(f"{figure} {value:,.0f}" if whole else f"{figure} {value:.3f}")
    return " · ".join(parts)

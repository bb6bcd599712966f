"""Ctrl-C where it does no harm: not while a library is in the middle of its own books."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

IMPATIENT = 1.0  # seconds after which a second Ctrl-C no longer waits; a group's come in pairs


class Held:
    """Within `with Held() as held`, Ctrl-C waits for the next `with held.through()`, inside which
    it strikes at once, or for the end.  A second one strikes wherever it finds the program.

    Only the main thread hears of Ctrl-C; in another one, and where it is ignored, nothing changes.
    """

    def __init__(self) -> None:
        self._before: Any = None  # what hears of it outside
        self._waiting: float | None = None  # since when
        self._open = False

    def __enter__(self) -> Held:
        self._before = signal.getsignal(signal.SIGINT)
        if callable(self._before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._hear)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if signal.getsignal(signal.SIGINT) == self._hear:
            signal.signal(signal.SIGINT, self._before)
        if error is None:
            self._strike_if_waiting()

    @contextmanager
    def through(self) -> Iterator[None]:
        """What may be cut off anywhere."""
        self._open = True
        try:
            self._strike_if_waiting()
            yield
        finally:
            self._open = False

    def _hear(self, number: int, frame: FrameType | None) -> None:
        again = self._waiting is not None and time.monotonic() - self._waiting > IMPATIENT
        if self._open or again:
            self._strike(frame)
        elif self._waiting is None:
            self._waiting = time.monotonic()

    def _strike_if_waiting(self) -> None:
        if self._waiting is not None:
            self._strike(None)

    def _strike(self, frame: FrameType | None) -> None:
        self._waiting = None
        self._before(signal.SIGINT, frame)


@contextmanager
def polite() -> Iterator[None]:
    """A polite kill (SIGTERM), as schedulers send it, is a Ctrl-C, even where that is ignored."""
    def hear(number: int, frame: FrameType | None) -> None:
        told = signal.getsignal(signal.SIGINT)
        (told if callable(told) else signal.default_int_handler)(signal.SIGINT, frame)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

"""Ctrl-C waits where it would do harm."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from searchpet import interrupts
from searchpet.interrupts import Held, polite


def strike() -> None:
    signal.raise_signal(signal.SIGINT)


def struck(during: Callable[[list[int]], None]) -> list[int]:
    """What had been done when Ctrl-C struck."""
    done: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        during(done)
    return done


@pytest.fixture(autouse=True)
def handler() -> Iterator[Any]:
    """Ctrl-C as a terminal has it, whatever the tests were started with."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # given back
    signal.signal(signal.SIGINT, before)


def test_it_waits_for_the_end() -> None:
    def during(done: list[int]) -> None:
        with Held():
            strike()
            strike()  # of the same keypress, by way of a parent
            done.append(1)
        done.append(2)

    assert struck(during) == [1]


def test_it_waits_for_what_may_be_cut_off() -> None:
    def during(done: list[int]) -> None:
        with Held() as held:
            strike()
            done.append(1)
            with held.through():
                done.append(2)

    assert struck(during) == [1]


def test_within_what_may_be_cut_off_it_strikes_at_once_and_after_that_it_waits_again() -> None:
    def during(done: list[int]) -> None:
        with Held() as held:
            with contextlib.suppress(KeyboardInterrupt), held.through():
                strike()
                done.append(1)
            done.append(2)
            strike()
            done.append(3)
        done.append(4)

    assert struck(during) == [2, 3]


def test_an_error_is_told_instead() -> None:
    def failing() -> None:
        with Held():
            strike()
            raise RuntimeError("of its own")

    with pytest.raises(RuntimeError, match="of its own"):
        failing()


def test_a_second_one_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 0.5, 2.0])
    monkeypatch.setattr(interrupts, "time", SimpleNamespace(monotonic=lambda: next(now)))

    def during(done: list[int]) -> None:
        with Held():
            strike()
            strike()
            done.append(1)
            strike()
            done.append(2)

    assert struck(during) == [1]


def test_where_it_is_ignored_it_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Held() as held:
        strike()
        with held.through():
            strike()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_another_handler_is_asked_instead() -> None:
    heard = []
    signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    with Held() as held:
        strike()
        assert heard == []
        with held.through():
            assert heard == [signal.SIGINT]
    assert heard == [signal.SIGINT]
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_thread_is_not_concerned() -> None:
    seen: list[Any] = []

    def inside() -> None:
        with Held() as held, held.through():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


@pytest.mark.parametrize("ignored", [False, True])
def test_a_polite_kill_is_a_ctrl_c(ignored: bool) -> None:
    if ignored:
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def during(done: list[int]) -> None:
        with polite():
            signal.raise_signal(signal.SIGTERM)
            done.append(1)

    assert struck(during) == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_polite_kill_waits_as_ctrl_c_does() -> None:
    def during(done: list[int]) -> None:
        with polite(), Held() as held:
            signal.raise_signal(signal.SIGTERM)
            done.append(1)
            with held.through():
                done.append(2)

    assert struck(during) == [1]

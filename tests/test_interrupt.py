"""Ctrl-C that waits, with real signals."""

from __future__ import annotations

import signal
import threading

import pytest

from robplug.interrupt import deferred_interrupt


def test_the_first_interrupt_waits_and_the_second_does_not() -> None:
    with pytest.raises(KeyboardInterrupt), deferred_interrupt() as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_handler_before_is_put_back() -> None:
    calls: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: calls.append(number))
    try:
        with deferred_interrupt():
            pass
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert calls == [signal.SIGINT]


def test_other_threads_are_left_alone() -> None:
    seen: list[bool] = []

    def work() -> None:
        with deferred_interrupt() as interrupted:
            seen.append(interrupted())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]

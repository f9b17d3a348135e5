"""Ctrl-C at a moment when everything is consistent."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deferred_interrupt(notice: str = "") -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C prints a notice and makes the yielded function return True; the second acts as ever.

    Outside the main thread, which no signal reaches, nothing is changed.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = signal.getsignal(signal.SIGINT)

    def remember(number: int, frame: FrameType | None) -> None:
        asked.set()
        if notice:
            print(f"\n{notice}", file=sys.stderr)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, remember)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)

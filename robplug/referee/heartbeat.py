"""How far a chunk got, readable after the process was killed.

An attack that takes the whole process down (killed for memory, a crash or hang in native code) would do so again at
every resume. A chunk that has died twice in a row after the same number of forward calls is given up; one that was
killed at two different places was killed by somebody, and is run again.
"""

from __future__ import annotations

import mmap
import struct
import time
from pathlib import Path

from robplug.referee.store import explained

_FORM = struct.Struct("<3q")  # starts, calls at the death before the last, calls at the last


class Heartbeat:
    """A small memory-mapped file: writing to it costs nothing, and the kernel keeps it when the process dies.

    Args:
        path: there if and only if the chunk was begun and did not finish.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._map: mmap.mmap | None = None
        self._starts, self._last = 1, -1

    def begin(self) -> bool:
        """Starts the chunk; returns False if it is to be given up.

        Raises:
            StoreError: the file cannot be written.
        """
        with explained(self._path):
            return self._begin()

    def _begin(self) -> bool:
        died_alike = False
        if self._path.exists() and self._path.stat().st_size == _FORM.size:
            starts, last, calls = _FORM.unpack(self._path.read_bytes())
            died_alike = starts >= 2 and last == calls
            self._starts, self._last = starts + 1, calls
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_bytes(_FORM.pack(self._starts, self._last, 0))
        with self._path.open("r+b") as handle:
            self._map = mmap.mmap(handle.fileno(), _FORM.size)
        return not died_alike

    def beat(self, calls: int) -> None:
        """Notes the number of forward calls so far."""
        assert self._map is not None  # begin comes first
        _FORM.pack_into(self._map, 0, self._starts, self._last, calls)

    def survived(self) -> None:
        """The attack has come back: a death from now on is not its doing, and never like another one."""
        self.beat(time.time_ns())

    def end(self) -> None:
        """The chunk is stored: the file goes."""
        if self._map is not None:
            self._map.close()
        self._path.unlink(missing_ok=True)

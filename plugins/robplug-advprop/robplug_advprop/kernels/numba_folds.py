"""Rows of C channels, several of which in succession, a fold, count as one wide row, as short loops are slow.

A group's rows are cut into segments, whose sums are put together afterwards: as many threads can work on a group. One
group is finished before the next, as its values may still be in the cores' caches when they are gone over again.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numba
import torch
from torch import Tensor

from robplug.cpu_kernels import Kernel

SEGMENTS = 16  # of a group at most
SHARE = 2**16  # values that a segment should have, or nearly twice as many
WIDE = 512  # values that a row should have
HERE, NONE = threading.local(), torch.empty(0)
BLOCK = 64  # rows whose sums single precision can hold


def run(step: Kernel, x: Tensor, groups: int, channels: int, words: Sequence[Any], coefficients: int) -> None:
    """Runs a kernel; behind its words it has the width of a fold, room, room and the number of segments.

    The room is for two sums a channel of each segment, and for some coefficients a channel.
    """
    wide = channels * max(1, WIDE // channels)
    shares = max(1, min(SEGMENTS, x.numel() // (groups * SHARE)))
    segments = 1 << (shares.bit_length() - 1)  # which most numbers of threads divide
    sums = segments * 2 * channels
    room = _room(sums + coefficients * wide // 2 + 1)
    step(x.numel(), groups, channels, *words, wide, room, room.data_ptr() + 8 * sums, segments)


def _room(size: int) -> Tensor:
    """Returns memory for some float64 values: this thread's, as getting some would take as long as a small layer."""
    if getattr(HERE, "room", NONE).numel() < size:
        HERE.room = torch.empty(size, dtype=torch.float64, device="cpu")
    return HERE.room


@numba.njit
def behind(words: Any, first: int, step: int) -> tuple[int, int, int, int]:
    """Returns the words that `run` adds: width, room for sums and coefficients, segments; groups' begin at first."""
    at = first + step * words[0]
    return words[at], words[at + 1], words[at + 2], words[at + 3]


@numba.njit
def rows_of(words: Any, k: int, part: int, first: int, step: int) -> tuple[int, int]:
    """Returns the first row of a segment of a group, and the one behind its last; groups' words begin at first."""
    channels, length, group = words[1], words[2], first + step * k
    wide, _, _, segments = behind(words, first, step)
    return segment(part, words[group] * length, words[group + 1] * length, wide // channels, segments)


@numba.njit
def segment(part: int, start: int, size: int, fold: int, segments: int) -> tuple[int, int]:
    """Returns the first row of a segment, and the one behind its last."""
    share = -(-size // (segments * fold)) * fold
    begin = min(size, part * share)
    return start + begin, start + min(size, begin + share)


@numba.njit
def block(n: int, end: int, channels: int, wide: int) -> tuple[int, int]:
    """Returns width and number of the rows that are added up next: wide ones while there are any."""
    width = wide if (end - n) * channels >= wide else channels
    return width, min(BLOCK, (end - n) * channels // width)


@numba.njit
def folds_backwards(begin: int, end: int, wide: int) -> range:
    """Returns where folds begin between two values, from the last, which may be shorter, to the first."""
    return range(begin + (end - begin - 1) // wide * wide, begin - 1, -wide)


@numba.njit
def repeat(values: Any, channels: int, first: int, last: int) -> None:
    """Writes what some channels have to where they are in the other rows of a fold."""
    for at in range(channels, values.size, channels):
        for j in range(first, last):
            values[at + j] = values[j]


@numba.njit
def fill(values: Any, value: Any) -> None:
    """Sets all values; compiled in a tenth of the time that ``values[:] = value`` takes."""
    for i in range(values.size):
        values[i] = value

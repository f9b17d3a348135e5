"""Rows of C channels, several of which in succession, a fold, count as one wide row, as short loops are slow.

A group's rows are cut into segments, whose sums are put together afterwards: as many threads can work on a group.
"""

from __future__ import annotations

from typing import Any

import numba
from torch import Tensor

SEGMENTS = 16  # of a group at most
SHARE = 2**16  # values that a segment should have
WIDE = 512  # values that a row should have
BLOCK = 64  # rows whose sums single precision can hold


def wide_row(channels: int) -> int:
    """Returns the number of values of a wide row: some rows' worth."""
    return channels * max(1, WIDE // channels)


def segments_of(x: Tensor, groups: int) -> int:
    """Returns into how many segments the rows of each group are cut."""
    return max(1, min(SEGMENTS, x.numel() // (groups * SHARE)))


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

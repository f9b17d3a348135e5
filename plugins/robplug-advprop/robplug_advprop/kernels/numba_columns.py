"""The forward pass where rows have the C channels; see ``numba_folds``."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from torch import Tensor

from robplug.cpu_kernels import FAST, Words, barrier, fetch, float32s, float64s, kernel, number, portion
from robplug_advprop.kernels.numba_channel import FORWARD, FORWARD_STEP, SINGLE, settle_forward
from robplug_advprop.kernels.numba_folds import behind, block, fill, folds_backwards, repeat, rows_of, run, segment

HEAD = 16  # rows whose mean is close enough to that of all to be subtracted before squaring


def forward(x: Tensor, groups: int, channels: int, *words: Any) -> None:
    """Normalises; the words are those of ``numba_channel``, and more behind them."""
    run(_forward, x, groups, channels, words, 2)


@kernel
def _forward(words: Words) -> None:
    for k in range(words[0]):
        _moments(words, k)
        barrier()
        _settle(words, k)
        barrier()
        _lines(words, k)


@numba.njit
def _moments(words: Words, k: int) -> None:
    channels, x = words[1], words[3]
    wide, sums, _, segments = behind(words, FORWARD, FORWARD_STEP)
    first, last = portion(segments)
    for part in range(first, last):
        begin, end = rows_of(words, k, part, FORWARD, FORWARD_STEP)
        here = float64s(sums + 8 * 2 * channels * part, 2 * channels)
        _moments_of_rows(x, begin, end, wide, here[:channels], here[channels:])


@numba.njit(fastmath=FAST)
def _moments_of_rows(x: int, begin: int, end: int, wide: int, mean: Any, squares: Any) -> None:
    """Writes the mean of each channel, and the sum of the squared deviations from it."""
    channels, count = mean.size, end - begin
    shift, total, square = np.zeros(wide, np.float32), np.empty(wide, np.float32), np.empty(wide, np.float32)
    fill(mean, 0)
    fill(squares, 0)
    head = min(HEAD, count)
    for n in range(begin, begin + head):
        row = float32s(x + SINGLE * n * channels, channels)
        for j in range(channels):
            shift[j] += row[j] / np.float32(head)
    repeat(shift, channels, 0, channels)
    n = begin
    while n < end:
        width, rows = block(n, end, channels, wide)
        fill(total, 0)
        fill(square, 0)
        _deviations(x + SINGLE * n * channels, rows, shift[:width], total[:width], square[:width])
        for at in range(0, width, channels):
            for j in range(channels):
                mean[j] += total[at + j]
                squares[j] += square[at + j]
        n += rows * width // channels
    for j in range(channels if count else 0):
        squares[j] -= mean[j] * mean[j] / count
        mean[j] = mean[j] / count + shift[j]


@numba.njit(fastmath=FAST)
def _deviations(x: int, rows: int, shift: Any, total: Any, square: Any) -> None:
    """Adds the deviations from shift, and their squares; two rows at once, which halves what is loaded and stored."""
    width = shift.size
    for n in range(0, rows - 1, 2):
        here = x + SINGLE * n * width
        fetch(here + SINGLE * 2 * width, 2 * width)
        first, second = float32s(here, width), float32s(here + SINGLE * width, width)
        for j in range(width):
            a, b = first[j] - shift[j], second[j] - shift[j]
            total[j] += a + b
            square[j] += a * a + b * b
    if rows % 2:
        row = float32s(x + SINGLE * (rows - 1) * width, width)
        for j in range(width):
            a = row[j] - shift[j]
            total[j] += a
            square[j] += a * a


@numba.njit
def _settle(words: Words, k: int) -> None:
    channels, length = words[1], words[2]
    wide, room, lines_at, segments = behind(words, FORWARD, FORWARD_STEP)
    sums, lines = float64s(room, 2 * channels * segments), float32s(lines_at, 2 * wide)
    slope, offset, rows = lines[:wide], lines[wide:], words[FORWARD + FORWARD_STEP * k + 1] * length
    first, last = portion(channels)
    mean, squares = np.empty(last - first, np.float64), np.empty(last - first, np.float64)
    _put_together(sums, segments, channels, first, rows, wide // channels, mean, squares)
    settle_forward(words, k, first, last, mean, squares, slope[first:last], offset[first:last])
    repeat(slope, channels, first, last)
    repeat(offset, channels, first, last)


@numba.njit(fastmath=FAST)
def _put_together(
    sums: Any, segments: int, channels: int, first: int, rows: int, fold: int, mean: Any, squares: Any
) -> None:
    """Writes mean and sum of the squared deviations from it for some channels, given those of the segments."""
    fill(mean, 0)
    fill(squares, 0)
    for part in range(segments):
        begin, end = segment(part, 0, rows, fold, segments)
        means = sums[2 * part * channels + first :]
        for j in range(mean.size):
            mean[j] += (end - begin) / rows * means[j]
    for part in range(segments):
        begin, end = segment(part, 0, rows, fold, segments)
        means, more = sums[2 * part * channels + first :], sums[(2 * part + 1) * channels + first :]
        for j in range(mean.size):
            squares[j] += more[j] + (end - begin) * (means[j] - mean[j]) ** 2


@numba.njit
def _lines(words: Words, k: int) -> None:
    channels, x, out = words[1], words[3], words[4]
    wide, _, lines, segments = behind(words, FORWARD, FORWARD_STEP)
    line, floor = float32s(lines, 2 * wide), np.float32(number(words[7]))
    first, last = portion(segments)
    for part in range(last - 1, first - 1, -1):  # backwards: what was read last is still in the cache
        begin, end = rows_of(words, k, part, FORWARD, FORWARD_STEP)
        for at in folds_backwards(begin * channels, end * channels, wide):
            here, width = SINGLE * at, min(wide, end * channels - at)
            fetch(x + here - SINGLE * 2 * wide, wide)
            fetch(out + here - SINGLE * 2 * wide, wide)
            _line(float32s(x + here, width), line[:wide], line[wide:], floor, float32s(out + here, width))


@numba.njit(fastmath=FAST)
def _line(row: Any, slope: Any, offset: Any, floor: Any, out: Any) -> None:
    for j in range(row.size):
        value = slope[j] * row[j] + offset[j]
        out[j] = floor if value < floor else value  # a NaN stays

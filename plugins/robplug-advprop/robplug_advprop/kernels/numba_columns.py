"""The forward pass where rows have the C channels; see ``numba_folds``."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from torch import Tensor

from robplug.cpu_kernels import FAST, Words, barrier, fetch, float32s, float64s, kernel, number, portion
from robplug_advprop.kernels.numba_channel import FORWARD, FORWARD_STEP, SINGLE, settle_forward
from robplug_advprop.kernels.numba_folds import block, fill, folds_backwards, repeat, rows_of, run, segment

HEAD = 16  # rows whose mean is close enough to that of all to be subtracted before squaring


def forward(x: Tensor, groups: int, channels: int, *words: Any) -> None:
    """Normalises; the words are those of ``numba_channel``, and more behind them."""
    run(_forward, x, groups, channels, words, 2)


@kernel
def _forward(words: Words) -> None:
    _moments(words)
    barrier()
    _settle(words)
    barrier()
    _lines(words)


@numba.njit
def _moments(words: Words) -> None:
    groups, channels, x = words[0], words[1], words[3]
    wide, sums = words[FORWARD + FORWARD_STEP * groups], words[FORWARD + FORWARD_STEP * groups + 1]
    segments = words[FORWARD + FORWARD_STEP * groups + 3]
    first, last = portion(groups * segments)
    for task in range(first, last):
        _, begin, end = rows_of(words, task, FORWARD, FORWARD_STEP)
        here = float64s(sums + 8 * 2 * channels * task, 2 * channels)
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
def _settle(words: Words) -> None:
    groups, channels, length = words[0], words[1], words[2]
    behind = FORWARD + FORWARD_STEP * groups
    wide, sums, lines, segments = words[behind], words[behind + 1], words[behind + 2], words[behind + 3]
    means, more = np.empty(channels, np.float64), np.empty(channels, np.float64)
    first, last = portion(groups * channels)  # so that most are of those whose rows this thread has gone through
    while first < last:
        k, begin = first // channels, first % channels
        end = min(channels, begin + last - first)
        rows = words[FORWARD + FORWARD_STEP * k + 1] * length
        here = float64s(sums + 8 * 2 * channels * segments * k, 2 * channels * segments)
        mean, squares = means[begin:end], more[begin:end]
        _put_together(here, segments, channels, begin, rows, wide // channels, mean, squares)
        slope = float32s(lines + SINGLE * 2 * k * wide, wide)
        offset = float32s(lines + SINGLE * (2 * k + 1) * wide, wide)
        settle_forward(words, k, begin, end, mean, squares, slope[begin:end], offset[begin:end])
        repeat(slope, channels, begin, end)
        repeat(offset, channels, begin, end)
        first += end - begin


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
def _lines(words: Words) -> None:
    groups, channels, x, out = words[0], words[1], words[3], words[4]
    wide, lines = words[FORWARD + FORWARD_STEP * groups], words[FORWARD + FORWARD_STEP * groups + 2]
    floor = np.float32(number(words[7]))
    segments = words[FORWARD + FORWARD_STEP * groups + 3]
    first, last = portion(groups * segments)
    for task in range(last - 1, first - 1, -1):  # backwards: what was read last is still in the cache
        k, begin, end = rows_of(words, task, FORWARD, FORWARD_STEP)
        line = float32s(lines + SINGLE * 2 * k * wide, 2 * wide)
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

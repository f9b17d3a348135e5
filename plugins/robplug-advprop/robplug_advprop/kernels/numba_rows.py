"""The kernels where channels of samples are rows of P values: a task is some channels of a group, whose
values stay in a core's cache while they are gone over again.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from torch import Tensor

from robplug.cpu_kernels import FAST, Words, fetch, float32s, kernel, number, portion
from robplug_advprop.kernels.numba_channel import (
    BACKWARD,
    BACKWARD_STEP,
    FORWARD,
    FORWARD_STEP,
    SINGLE,
    settle_backward,
    settle_forward,
)
from robplug_advprop.kernels.numba_folds import fill

CACHE = 2**16  # values that stay in a core's cache
MOST = 64  # channels of a task
PIECE = 2**12  # values whose sum single precision can hold
SHORT = 2**10  # values of a row whose end comes before the processor sees that it is to fetch
AHEAD = 2**12  # bytes from what is worked on to what is fetched


def forward(x: Tensor, *words: Any) -> None:
    """Normalises; the words are those of ``numba_channel``."""
    _forward(x.numel(), *words)


def backward(x: Tensor, *words: Any) -> None:
    """Writes gradients; the words are those of ``numba_channel``."""
    _backward(x.numel(), *words)


@kernel
def _forward(words: Words) -> None:
    groups, channels, length, x, out = words[0], words[1], words[2], words[3], words[4]
    floor = np.float32(number(words[7]))
    mean, squares = np.empty(MOST, np.float64), np.empty(MOST, np.float64)
    slope, offset = np.empty(MOST, np.float32), np.empty(MOST, np.float32)
    first, last = portion(groups * channels)
    while first < last:
        k, c = first // channels, first % channels
        start, size = words[FORWARD + FORWARD_STEP * k], words[FORWARD + FORWARD_STEP * k + 1]
        span = _span(size * length, min(last - first, channels - c))
        at, step = SINGLE * length * (start * channels + c), SINGLE * length * channels
        for j in range(span):
            mean[j], squares[j] = _moments(x + at + SINGLE * length * j, step, size, length)
        settle_forward(words, k, c, c + span, mean[:span], squares[:span], slope, offset)
        for n in range(size):
            for j in range(span):
                here = at + n * step + SINGLE * length * j
                _fetch_rows((out + here,), length)
                _line(float32s(x + here, length), slope[j], offset[j], floor, float32s(out + here, length))
        first += span


@kernel
def _backward(words: Words) -> None:
    groups, channels, length, g, x, gate, out = words[0], words[1], words[2], words[3], words[4], words[5], words[8]
    floor = np.float32(number(words[6]))
    by_bias, product = np.empty(MOST, np.float64), np.empty(MOST, np.float64)
    along_g, along_x = np.empty(MOST, np.float32), np.empty(MOST, np.float32)
    offset = np.empty(MOST, np.float32)
    first, last = portion(groups * channels)
    while first < last:
        k, c = first // channels, first % channels
        start, size = words[BACKWARD + BACKWARD_STEP * k], words[BACKWARD + BACKWARD_STEP * k + 1]
        span = _span(size * length, min(last - first, channels - c))
        at, step = SINGLE * length * (start * channels + c), SINGLE * length * channels
        mean = float32s(words[7] + SINGLE * first, span)
        fill(by_bias, 0)
        fill(product, 0)
        for n in range(size):
            for j in range(span):
                here = at + n * step + SINGLE * length * j
                for piece in range(0, length, PIECE):
                    there, rest = here + SINGLE * piece, min(PIECE, length - piece)
                    _fetch_rows((g + there, x + there, gate + there), rest)
                    slopes, row, gates = _three(g + there, x + there, gate + there, rest)
                    sums = _products(slopes, row, mean[j], gates, floor)
                    by_bias[j] += sums[0]
                    product[j] += sums[1]
        settle_backward(words, k, c, c + span, by_bias, product, along_g, along_x, offset)
        for n in range(size):
            for j in range(span):
                here = at + n * step + SINGLE * length * j
                _fetch_rows((out + here,), length)
                slopes, row, gates = _three(g + here, x + here, gate + here, length)
                _plane(slopes, row, along_g[j], along_x[j], offset[j], gates, floor, float32s(out + here, length))
        first += span


@numba.njit
def _span(values: int, left: int) -> int:
    """Returns how many of the channels that are left a task takes on, so that their values stay in a core's cache."""
    return max(1, min(MOST, left, CACHE // values))


@numba.njit
def _fetch_rows(rows: Any, length: int) -> None:
    if length <= SHORT:
        for row in rows:
            fetch(row + AHEAD, length)


@numba.njit
def _moments(x: int, step: int, size: int, length: int) -> tuple[float, float]:
    """Returns mean and sum of the squared deviations from it.

    The first sum finds the mean to single precision, and the deviations from that correct it.
    """
    total, deviations, squares, count = 0.0, 0.0, 0.0, size * length
    for n in range(size):
        for at in range(0, length, PIECE):
            here, rest = x + n * step + SINGLE * at, min(PIECE, length - at)
            _fetch_rows((here,), rest)
            total += _sum(float32s(here, rest))
    centre = np.float32(total / count)
    for n in range(size):
        for at in range(0, length, PIECE):
            sums = _deviations(float32s(x + n * step + SINGLE * at, min(PIECE, length - at)), centre)
            deviations += sums[0]
            squares += sums[1]
    return centre + deviations / count, squares - deviations * deviations / count


@numba.njit(fastmath=FAST)
def _sum(row: Any) -> Any:
    total = np.float32(0)
    for i in range(row.size):
        total += row[i]
    return total


@numba.njit(fastmath=FAST)
def _deviations(row: Any, centre: Any) -> Any:
    total, squares = np.float32(0), np.float32(0)
    for i in range(row.size):
        total += row[i] - centre
        squares += (row[i] - centre) ** 2
    return total, squares


@numba.njit
def _three(g: int, x: int, gate: int, length: int) -> Any:
    return float32s(g, length), float32s(x, length), float32s(gate, length)


@numba.njit(fastmath=FAST)
def _line(row: Any, slope: Any, offset: Any, floor: Any, out: Any) -> None:
    for i in range(row.size):
        value = slope * row[i] + offset
        out[i] = floor if value < floor else value  # a NaN stays


@numba.njit(fastmath=FAST)
def _products(g: Any, x: Any, mean: Any, gate: Any, floor: Any) -> Any:
    total, product = np.float32(0), np.float32(0)
    for i in range(g.size):
        passed = np.float32(0) if gate[i] <= floor else g[i]
        total += passed
        product += passed * (x[i] - mean)
    return total, product


@numba.njit(fastmath=FAST)
def _plane(g: Any, x: Any, along_g: Any, along_x: Any, offset: Any, gate: Any, floor: Any, out: Any) -> None:
    for i in range(g.size):
        passed = np.float32(0) if gate[i] <= floor else g[i]
        out[i] = along_g * passed + (along_x * x[i] + offset)

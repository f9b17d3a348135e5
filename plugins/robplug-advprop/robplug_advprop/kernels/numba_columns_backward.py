"""The backward pass where rows have the C channels; see ``numba_folds``."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from torch import Tensor

from robplug.cpu_kernels import FAST, Words, barrier, fetch, float32s, float64s, kernel, number, portion
from robplug_advprop.kernels.numba_channel import BACKWARD, BACKWARD_STEP, SINGLE, settle_backward
from robplug_advprop.kernels.numba_folds import behind, block, fill, folds_backwards, repeat, rows_of, run


def backward(x: Tensor, groups: int, channels: int, *words: Any) -> None:
    """Writes gradients; the words are those of ``numba_channel``, and more behind them."""
    run(_backward, x, groups, channels, words, 3)


@kernel
def _backward(words: Words) -> None:
    for k in range(words[0]):
        _products(words, k)
        barrier()
        _settle(words, k)
        barrier()
        _planes(words, k)


@numba.njit
def _products(words: Words, k: int) -> None:
    channels, g, x, gate = words[1], words[3], words[4], words[5]
    wide, sums, _, segments = behind(words, BACKWARD, BACKWARD_STEP)
    floor = np.float32(number(words[6]))
    total, product, mean = np.empty(wide, np.float32), np.empty(wide, np.float32), np.empty(wide, np.float32)
    means = float32s(words[7] + SINGLE * k * channels, channels)
    for j in range(channels):
        mean[j] = means[j]
    repeat(mean, channels, 0, channels)
    first, last = portion(segments)
    for part in range(first, last):
        n, end = rows_of(words, k, part, BACKWARD, BACKWARD_STEP)
        here = float64s(sums + 8 * 2 * channels * part, 2 * channels)
        by_bias, by_product = here[:channels], here[channels:]
        fill(by_bias, 0)
        fill(by_product, 0)
        while n < end:
            width, rows = block(n, end, channels, wide)
            fill(total, 0)
            fill(product, 0)
            there = SINGLE * n * channels
            _add_products(g + there, x + there, gate + there, rows, mean[:width], floor, total, product)
            for at in range(0, width, channels):
                for j in range(channels):
                    by_bias[j] += total[at + j]
                    by_product[j] += product[at + j]
            n += rows * width // channels


@numba.njit(fastmath=FAST)
def _add_products(g: int, x: int, gate: int, rows: int, mean: Any, floor: Any, total: Any, product: Any) -> None:
    """Adds what passes of g, and its products with x - mean; two rows at once."""
    width = mean.size
    for n in range(0, rows - 1, 2):
        one, two = SINGLE * n * width, SINGLE * (n + 1) * width
        for values in (g, x, gate):
            fetch(values + one + SINGLE * 2 * width, 2 * width)
        g1, x1, gate1 = float32s(g + one, width), float32s(x + one, width), float32s(gate + one, width)
        g2, x2, gate2 = float32s(g + two, width), float32s(x + two, width), float32s(gate + two, width)
        for j in range(width):
            first = np.float32(0) if gate1[j] <= floor else g1[j]
            second = np.float32(0) if gate2[j] <= floor else g2[j]
            total[j] += first + second
            product[j] += first * (x1[j] - mean[j]) + second * (x2[j] - mean[j])
    if rows % 2:
        last = SINGLE * (rows - 1) * width
        g1, x1, gate1 = float32s(g + last, width), float32s(x + last, width), float32s(gate + last, width)
        for j in range(width):
            first = np.float32(0) if gate1[j] <= floor else g1[j]
            total[j] += first
            product[j] += first * (x1[j] - mean[j])


@numba.njit
def _settle(words: Words, k: int) -> None:
    channels = words[1]
    wide, room, coefficients_at, segments = behind(words, BACKWARD, BACKWARD_STEP)
    sums, plane = float64s(room, 2 * channels * segments), float32s(coefficients_at, 3 * wide)
    along_g, along_x, offset = plane[:wide], plane[wide : 2 * wide], plane[2 * wide :]
    first, last = portion(channels)
    by_bias, product = sums[first:last], sums[channels + first : channels + last]
    for at in range(2 * channels, sums.size, 2 * channels):
        more, others = sums[at + first : at + last], sums[at + channels + first : at + channels + last]
        for j in range(last - first):
            by_bias[j] += more[j]
            product[j] += others[j]
    settle_backward(
        words, k, first, last, by_bias, product, along_g[first:last], along_x[first:last], offset[first:last]
    )
    for coefficients in (along_g, along_x, offset):
        repeat(coefficients, channels, first, last)


@numba.njit
def _planes(words: Words, k: int) -> None:
    channels, g, x, gate, out = words[1], words[3], words[4], words[5], words[8]
    wide, _, planes, segments = behind(words, BACKWARD, BACKWARD_STEP)
    plane, floor = float32s(planes, 3 * wide), np.float32(number(words[6]))
    first, last = portion(segments)
    for part in range(last - 1, first - 1, -1):  # backwards: what was read last is still in the cache
        begin, end = rows_of(words, k, part, BACKWARD, BACKWARD_STEP)
        for at in folds_backwards(begin * channels, end * channels, wide):
            here, width = SINGLE * at, min(wide, end * channels - at)
            for values in (g, x, gate, out):
                fetch(values + here - SINGLE * 2 * wide, wide)
            _plane(
                float32s(g + here, width), float32s(x + here, width), plane, wide,
                float32s(gate + here, width), floor, float32s(out + here, width))  # fmt: skip


@numba.njit(fastmath=FAST)
def _plane(g: Any, x: Any, plane: Any, wide: int, gate: Any, floor: Any, out: Any) -> None:
    along_g, along_x, offset = plane[:wide], plane[wide : 2 * wide], plane[2 * wide :]
    for j in range(g.size):
        passed = np.float32(0) if gate[j] <= floor else g[j]
        out[j] = along_g[j] * passed + (along_x[j] * x[j] + offset[j])

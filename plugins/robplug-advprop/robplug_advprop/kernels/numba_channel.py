"""What is done for each channel of a group, once its sums are known.

The kernels have their words in common. Forward: K, C, P, x, out, what is found (K means and then K inverse
deviations), eps, floor, and from FORWARD on, for each group, its first sample, its size, weight, bias, running mean,
running variance and momentum. Backward: K, C, P, g, x, gate, floor, what was found, and the gradients of x and of K
weights and then K biases, and from BACKWARD on, for each group, its first sample, its size and its weight.

A ReLU is a floor of 0; no ReLU is one of minus infinity, also where gradients pass a gate that is above the floor.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

from robplug.cpu_kernels import FAST, float32s, number

FORWARD, FORWARD_STEP = 8, 7
BACKWARD, BACKWARD_STEP = 10, 3
SINGLE = 4  # bytes


@numba.njit(fastmath=FAST)
def settle_forward(words: Any, k: int, begin: int, end: int, mean: Any, squares: Any, slope: Any, offset: Any) -> None:
    """Keeps the statistics of some channels of a group, and writes slope and offset for their values.

    Args:
        words: of the kernel.
        k: the group.
        begin: first channel.
        end: the one after the last; the arrays begin at the first.
        mean: float64.
        squares: sum of the squared deviations from the mean, float64; overwritten.
        slope: written, float32.
        offset: likewise.
    """
    groups, channels, group, size = words[0], words[1], FORWARD + FORWARD_STEP * k, end - begin
    count, eps = words[group + 1] * words[2], number(words[6])
    if words[group + 4]:
        _move(float32s(words[group + 4] + SINGLE * begin, size), mean, 1.0, number(words[group + 6]))
    if words[group + 5]:
        _move(float32s(words[group + 5] + SINGLE * begin, size), squares, 1 / (count - 1), number(words[group + 6]))
    at, half = SINGLE * (k * channels + begin), SINGLE * groups * channels
    means, inverses = float32s(words[5] + at, size), float32s(words[5] + half + at, size)
    weight, bias = float32s(words[group + 2] + SINGLE * begin, size), float32s(words[group + 3] + SINGLE * begin, size)
    for j in range(size):
        squares[j] = 1 / math.sqrt(squares[j] / count + eps)
    for j in range(size):
        means[j], inverses[j] = mean[j], squares[j]
    for j in range(size):
        slope[j] = squares[j] * weight[j]
        offset[j] = bias[j] - mean[j] * squares[j] * weight[j]


@numba.njit(fastmath=FAST)
def _move(running: Any, batch: Any, factor: float, share: float) -> None:
    for j in range(running.size):
        running[j] += share * (batch[j] * factor - running[j])


@numba.njit(fastmath=FAST)
def settle_backward(
    words: Any, k: int, begin: int, end: int, by_bias: Any, product: Any, along_g: Any, along_x: Any, offset: Any
) -> None:
    """Keeps the gradients of some channels' weights and biases, and writes how that of x depends on g, x and neither.

    With n values in a channel and s what they were divided by: by_weight = product / s, and
    by_x = weight / s (g - by_bias / n - (x - mean) / s by_weight / n).

    Args:
        words: of the kernel.
        k: the group.
        begin: first channel.
        end: the one after the last; the arrays begin at the first.
        by_bias: sum of g, float64.
        product: sum of g (x - mean), float64.
        along_g: written, float32.
        along_x: likewise.
        offset: likewise.
    """
    groups, channels, group, size = words[0], words[1], BACKWARD + BACKWARD_STEP * k, end - begin
    share, at = 1.0 / (words[group + 1] * words[2]), SINGLE * (k * channels + begin)
    half = SINGLE * groups * channels
    mean, inverse = float32s(words[7] + at, size), float32s(words[7] + half + at, size)
    weights, biases = float32s(words[9] + at, size), float32s(words[9] + half + at, size)
    weight = float32s(words[group + 2] + SINGLE * begin, size)
    for j in range(size):
        weights[j] = product[j] * inverse[j]
        biases[j] = by_bias[j]
    for j in range(size):
        first = np.float64(inverse[j]) * weight[j]
        second = -first * inverse[j] * inverse[j] * product[j] * share
        along_g[j], along_x[j] = first, second
        offset[j] = -first * by_bias[j] * share - second * mean[j]

"""The kernels for the CPU in single precision: one pass over a layer, where plain PyTorch makes six.

Sums do not depend on the number of threads: they are those of blocks.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from robplug.cpu_kernels import (
    FAST,
    Words,
    barrier,
    fetch,
    float32s,
    float64s,
    int8s,
    kernel,
    number,
    portion,
    portion_of_values,
)

BLOCK = 2**12  # values that are summed up in single precision
STRIP = 2**8  # values that are worked on while others are fetched
AHEAD = 2**12  # bytes from ones to the others
SINGLE = 4  # bytes


def accumulate_signs(clean: Tensor, noisy: Tensor, sums: Tensor, draw: int) -> tuple[Tensor, Tensor]:
    """See `robplug_nsloss.kernels.reference.accumulate_one`; the three lie alike."""
    size = clean.numel()
    signs, parts = torch.empty_like(sums), clean.new_empty(-(-size // BLOCK))
    _accumulate(size, size, clean, noisy, sums, signs, parts, draw, 1 / size)
    return parts, signs


def add_signs(g: Tensor, signs: Tensor, weight: Tensor) -> Tensor:
    """See `robplug_nsloss.kernels.reference.add_signs`; the two lie alike."""
    out = torch.empty_like(g)
    _add(g.numel(), g.numel(), g, signs, weight.item() / g.numel(), out, 0)
    return out


def relu_add_signs(g: Tensor, signs: Tensor, weight: Tensor, activation: Tensor) -> Tensor:
    """Returns what `add_signs` returns where the activation is not 0, and 0 elsewhere; the three lie alike."""
    out = torch.empty_like(g)
    _add(g.numel(), g.numel(), g, signs, weight.item() / g.numel(), out, activation)
    return out


def batch_norm_backward(
    g: Tensor, x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients by x, weight and bias of batch norm in eval mode; g and x (N, C, ...) are contiguous."""
    samples, channels = x.shape[:2]
    out, by_rows = torch.empty_like(x), torch.empty(2, channels, dtype=x.dtype, device=x.device)
    parts = torch.empty(2, samples, channels, dtype=torch.float64, device=x.device)
    length = x.numel() // (samples * channels)
    _norm(x.numel(), samples, channels, length, g, x, mean, variance, weight, eps, out, parts, by_rows)
    return out, *by_rows.unbind()


@kernel
def _accumulate(words: Words) -> None:
    size, draw = words[0], words[6]
    sums, signs = int8s(words[3], size), int8s(words[4], size)
    clean, noisy = float32s(words[1], size), float32s(words[2], size)
    parts, scale = float32s(words[5], -(-size // BLOCK)), np.float32(number(words[7]))
    first, last = portion(parts.size)
    for block in range(first, last):
        total, end = np.float32(0), min(size, (block + 1) * BLOCK)
        for begin in range(block * BLOCK, end, STRIP):
            at = slice(begin, min(end, begin + STRIP))
            fetch(words[1] + SINGLE * begin + AHEAD, STRIP)
            fetch(words[2] + SINGLE * begin + AHEAD, STRIP)
            fetch(words[3] + begin + AHEAD, STRIP // SINGLE)
            fetch(words[4] + begin + AHEAD, STRIP // SINGLE)
            total += _compare(clean[at], noisy[at], signs[at])
            if draw == 0:
                _copy(signs[at], sums[at])
            else:
                _increase(signs[at], sums[at])
        parts[block] = scale * total


@numba.njit(fastmath=FAST)
def _compare(clean: Any, noisy: Any, signs: Any) -> Any:
    """Writes the signs of the differences and returns the sum of their absolute values."""
    total = np.float32(0)
    for i in range(clean.size):
        difference = noisy[i] - clean[i]
        total += abs(difference)
        signs[i] = np.int8(difference > 0) - np.int8(difference < 0)
    return total


@numba.njit
def _copy(signs: Any, sums: Any) -> None:
    for i in range(signs.size):
        sums[i] = signs[i]


@numba.njit
def _increase(signs: Any, sums: Any) -> None:
    for i in range(signs.size):
        sums[i] += signs[i]


@kernel
def _add(words: Words) -> None:
    size, scale, activation = words[0], np.float32(number(words[3])), words[5]
    g, signs, out = float32s(words[1], size), int8s(words[2], size), float32s(words[4], size)
    start, stop = portion_of_values(size)
    for begin in range(start, stop, STRIP):
        at = slice(begin, min(stop, begin + STRIP))
        fetch(words[1] + SINGLE * begin + AHEAD, STRIP)
        fetch(words[2] + begin + AHEAD, STRIP // SINGLE)
        fetch(words[4] + SINGLE * begin + AHEAD, STRIP)
        if activation:
            fetch(activation + SINGLE * begin + AHEAD, STRIP)
            _add_where_passed(g[at], signs[at], scale, float32s(activation, size)[at], out[at])
        else:
            _add_everywhere(g[at], signs[at], scale, out[at])


@numba.njit(fastmath=FAST)
def _add_everywhere(g: Any, signs: Any, scale: Any, out: Any) -> None:
    for i in range(g.size):
        out[i] = g[i] + scale * np.float32(signs[i])


@numba.njit(fastmath=FAST)
def _add_where_passed(g: Any, signs: Any, scale: Any, activation: Any, out: Any) -> None:
    for i in range(g.size):
        out[i] = np.float32(0) if activation[i] <= 0 else g[i] + scale * np.float32(signs[i])


@kernel
def _norm(words: Words) -> None:
    samples, channels, length, g, x, out = words[0], words[1], words[2], words[3], words[4], words[9]
    mean, variance, weight = float32s(words[5], channels), float32s(words[6], channels), float32s(words[7], channels)
    rows, eps = samples * channels, number(words[8])
    parts, by_rows = float64s(words[10], 2 * rows), float32s(words[11], 2 * channels)
    first, last = portion(rows)
    for row in range(first, last):
        c = row % channels
        deviation = np.sqrt(variance[c] + eps)
        scale, product, total = np.float32(weight[c] / deviation), 0.0, 0.0
        for begin in range(0, length, STRIP):
            here, size = SINGLE * (row * length + begin), min(STRIP, length - begin)
            fetch(g + here + AHEAD, size)
            fetch(x + here + AHEAD, size)
            fetch(out + here + AHEAD, size)
            slopes, values, results = float32s(g + here, size), float32s(x + here, size), float32s(out + here, size)
            sums = _scale(slopes, values, mean[c], scale, results)
            product += sums[0]
            total += sums[1]
        parts[row], parts[rows + row] = product / deviation, total
    barrier()
    first, last = portion(2 * channels)
    for row in range(first, last):
        total = 0.0
        for part in range(row // channels * rows + row % channels, (row // channels + 1) * rows, channels):
            total += parts[part]
        by_rows[row] = total


@numba.njit(fastmath=FAST)
def _scale(g: Any, x: Any, mean: Any, scale: Any, out: Any) -> Any:
    """Writes scale * g, and returns the sums of g * (x - mean) and of g."""
    product, total = np.float32(0), np.float32(0)
    for i in range(g.size):
        product += g[i] * (x[i] - mean)
        total += g[i]
        out[i] = scale * g[i]
    return product, total

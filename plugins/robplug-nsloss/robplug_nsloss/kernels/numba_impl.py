"""The kernels for the CPU in single precision: one pass over a layer, where plain PyTorch makes six.

Sums do not depend on the number of threads: they are those of blocks.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from robplug.cpu_kernels import FAST, Words, fetch, float32s, int8s, kernel, number, portion, portion_of_values

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

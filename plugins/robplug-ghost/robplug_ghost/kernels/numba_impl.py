"""The masks of dropout erosion for the CPU: Philox in registers, where plain PyTorch makes a hundred passes."""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from robplug.cpu_kernels import Words, float32s, kernel, number, portion
from robplug_ghost.kernels.reference import (
    BITS,
    DROPOUT,
    KEY_STEPS,
    MULTIPLIERS,
    ROUNDS,
    laid_out,
    threshold,
)

WORD, HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
KIND = np.uint64(DROPOUT)
FIRST, SECOND = (np.uint64(value) for value in MULTIPLIERS)
FIRST_STEP, SECOND_STEP = (np.uint64(value) for value in KEY_STEPS)


def erode_dropout(x: Tensor, seed: int, layer: int, keep: float) -> Tensor:
    """See `robplug_ghost.kernels.reference.erode_dropout`; x is not float64."""
    factors = x.new_empty(x.shape[1:], dtype=torch.float32)
    channels, positions = x.shape[1], math.prod(x.shape[2:])
    limit = threshold(keep) << (32 - BITS)
    _write_factors(channels * positions, channels, positions, factors, seed, layer, limit, 1 / keep)
    out = x * factors if x.dtype == torch.float32 else x.float() * factors
    if out.dtype == x.dtype and out.stride() == x.stride() and x.is_contiguous():
        return out
    return laid_out(out, x)


@kernel
def _write_factors(words: Words) -> None:
    channels, positions = words[0], words[1]
    seed, layer, limit, scale = np.uint64(words[3]), np.uint64(words[4]), words[5], np.float32(number(words[6]))
    blocks = -(-positions // 4)
    one, two = np.empty(blocks, np.uint32), np.empty(blocks, np.uint32)
    three, four = np.empty(blocks, np.uint32), np.empty(blocks, np.uint32)
    first, last = portion(channels)
    for c in range(first, last):
        _draw(np.uint64(c), layer, seed & WORD, seed >> HALF, one, two, three, four)
        _choose(one, two, three, four, limit, scale, float32s(words[2] + 4 * c * positions, positions))


@numba.njit
def _draw(channel: Any, layer: Any, key: Any, other_key: Any, one: Any, two: Any, three: Any, four: Any) -> None:
    """Writes the words of Philox4x32-10 for each block of four positions; see ``reference.philox``."""
    for block in range(one.size):
        a, b, c, d = np.uint64(block), channel, layer, KIND
        k, other_k = key, other_key
        for _ in range(ROUNDS):
            first, second = a * FIRST, c * SECOND
            a, b, c, d = (second >> HALF) ^ b ^ k, second & WORD, (first >> HALF) ^ d ^ other_k, first & WORD
            k, other_k = (k + FIRST_STEP) & WORD, (other_k + SECOND_STEP) & WORD
        one[block], two[block], three[block], four[block] = a, b, c, d


@numba.njit
def _choose(one: Any, two: Any, three: Any, four: Any, limit: Any, scale: Any, out: Any) -> None:
    """Writes scale where a word is below the limit, and 0 elsewhere."""
    none = np.float32(0)
    whole = out.size // 4
    for block in range(whole):
        out[4 * block] = scale if one[block] < limit else none
        out[4 * block + 1] = scale if two[block] < limit else none
        out[4 * block + 2] = scale if three[block] < limit else none
        out[4 * block + 3] = scale if four[block] < limit else none
    left = one[-1], two[-1], three[-1]
    for i in range(out.size - 4 * whole):
        out[4 * whole + i] = scale if left[i] < limit else none

"""The definition of the kernels in plain PyTorch, forward and backward; what runs where no kernel does.

Random numbers are words of Philox4x32-10 (Salmon et al. 2011, section 3.3) with a ghost's seed as key, so that any of
them can be had alone and anew. The last word of the counter says what for:

| counter | what for |
|-|-|
| channel // 4, 0, layer, 0 | the weight of a channel, from word channel % 4 |
| position // 4, channel, layer, 1 | whether a position of a channel is kept, from word position % 4 |
| low and high word of n, 0, 2 | the seed of a series' n-th ghost, from words 0 and 1 |

No batch index occurs: a ghost is one network, the same for all samples. Values are computed in float32, or in float64
where they are float64, and rounded once at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SKIP, DROPOUT, SERIES = 0, 1, 2
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
WORD = 0xFFFFFFFF
CHUNK = 2**18  # counters at a time
BITS = 24  # of a word that a float32 holds exactly
TOGETHER, NARROW, REMEMBERED = 16, 256, 64  # layers of a table and channels that it has at least, and tables
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

_tables: dict[tuple[int, int, int, float, torch.device | None], Tensor] = {}


def accumulator(x: Tensor) -> torch.dtype:
    """Returns the dtype to compute in: float32, or float64 where the tensor has it."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def memory_format(x: Tensor) -> torch.memory_format:
    """Returns how a result of the shape of x lies: channels last if x has them last, contiguous otherwise."""
    last = LAST.get(x.dim())
    if x.is_contiguous() or last is None or not x.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last


def empty(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Returns room for a result of the shape of x."""
    return torch.empty_like(x, dtype=dtype, memory_format=memory_format(x))


def philox(seed: int, counter: Sequence[Any]) -> list[Any]:
    """Returns the four words of Philox4x32-10 for a counter's four words, each from 0 to 2**32 - 1.

    Words are numbers or int64 tensors that broadcast. They are not expanded before they must be: where a
    counter is made of a row and a column, the first two of ten rounds cost next to nothing.

    Only what is multiplied is cut to 32 bits: masks distribute over exclusive or.
    """
    a, b, c, d = counter
    keys = seed & WORD, seed >> 32
    for _ in range(ROUNDS):
        first, second = a * MULTIPLIERS[0], c * MULTIPLIERS[1]  # modulo 2**64
        a, c = (second >> 32) ^ b, (first >> 32) ^ d
        a ^= keys[0]
        c ^= keys[1]
        a &= WORD
        c &= WORD
        b, d = second, first
        keys = (keys[0] + KEY_STEPS[0]) & WORD, (keys[1] + KEY_STEPS[1]) & WORD
    return [a, b & WORD, c, d & WORD]


def series_seed(seed: int, number: int) -> int:
    """Returns the seed, 63 bits, of the ghost with this number >= 1 in the series that a seed begins."""
    low, high, *_ = philox(seed, (number & WORD, number >> 32, 0, SERIES))
    return int(high << 32 | low) & (2**63 - 1)


def channel_weights(seed: int, layer: int, channels: int, skip: float, device: torch.device | None = None) -> Tensor:
    """Returns (C,) float32 weights from U[1 - skip, 1 + skip].

    A small layer's weights take longer to ask for than to compute: those of neighbouring layers and channels are drawn
    along, and the latest tables remembered, for the gradient as well.
    """
    key = (seed, layer // TOGETHER, max(channels, NARROW), skip, device)
    if key not in _tables:
        if len(_tables) >= REMEMBERED:
            _tables.pop(next(iter(_tables)), None)
        _tables[key] = _weights(*key)
    return _tables[key][layer % TOGETHER, :channels]


def _weights(seed: int, group: int, channels: int, skip: float, device: torch.device | None) -> Tensor:
    """Returns (TOGETHER, C) weights, equal bit for bit on every device.

    The 24 bits and the skip, rounded to float32, have an exact product in float64, so that it makes no difference
    whether the addition is fused.
    """
    column = torch.arange(-(-channels // 4), device=device)
    layers = torch.arange(group * TOGETHER, (group + 1) * TOGETHER, device=device)[:, None]
    words = torch.stack(philox(seed, (column, 0, layers, SKIP)), dim=-1)
    bits = words.flatten(1)[:, :channels] >> (32 - BITS)
    symmetric = (2 * bits + 1 - (1 << BITS)).double() / (1 << BITS)
    return (1 + single(skip) * symmetric).float()


def kept(seed: int, layer: int, channels: int, positions: int, keep: float, device: torch.device) -> Tensor:
    """Returns (C, P) bool, true with the probability ``keep``."""
    blocks = -(-positions // 4)
    chosen = torch.empty(channels, blocks, 4, dtype=torch.bool, device=device)
    column = torch.arange(blocks, device=device)
    share = max(1, CHUNK // max(1, blocks))
    for rows, out in zip(torch.arange(channels, device=device)[:, None].split(share), chosen.split(share), strict=True):
        for i, word in enumerate(philox(seed, (column, rows, layer, DROPOUT))):
            out[..., i] = word < threshold(keep) << (32 - BITS)
    return chosen.flatten(1)[:, :positions]


def single(value: float) -> float:
    """Returns a number rounded to float32."""
    return float(torch.tensor(value, dtype=torch.float32))


def threshold(keep: float) -> int:
    """Returns the number below which 24 random bits mean that a value is kept."""
    return max(1, round(keep * (1 << BITS)))


def erode_add(shortcut: Tensor, residual: Tensor, seed: int, layer: int, skip: float, relu: bool) -> Tensor:
    """Returns w * shortcut + residual, with one w a channel, or its positive part; (N, C, ...).

    Autograd keeps the weights, and the result of a ReLU.
    """
    acc = accumulator(residual)
    total = torch.addcmul(residual.to(acc), shortcut.to(acc), _along(residual, seed, layer, skip))
    return laid_out(total.relu_() if relu else total, residual)


def erode_add_backward(g: Tensor, out: Tensor, seed: int, layer: int, skip: float) -> tuple[Tensor, Tensor]:
    """Returns the gradients of shortcut and residual behind a ReLU whose result was ``out``."""
    residual = empty(out)
    torch.ops.aten.threshold_backward.grad_input(g, out, 0, grad_input=residual)
    return erode_scale(residual, seed, layer, skip), residual


def erode_scale(x: Tensor, seed: int, layer: int, skip: float) -> Tensor:
    """Returns w * x, with one w a channel; (N, C, ...). It is its own adjoint; autograd keeps the weights."""
    return laid_out(x.to(accumulator(x)) * _along(x, seed, layer, skip), x)


def erode_dropout(x: Tensor, seed: int, layer: int, keep: float) -> Tensor:
    """Returns x / keep where a value is kept, and 0 elsewhere; (N, C, ...).

    It is its own adjoint; autograd keeps the mask, which all samples share.
    """
    return laid_out(x.to(accumulator(x)) * _mask(x, seed, layer, keep), x)


def laid_out(values: Tensor, x: Tensor) -> Tensor:
    """Returns values in the dtype of x, channels last if x has them last, contiguous otherwise."""
    out = values.to(x.dtype)
    # the strides of axes of size 1 count as well: torch.compile has been promised those of `empty`
    return out if out.stride() == empty(x).stride() else out.clone(memory_format=memory_format(x))


def _mask(x: Tensor, seed: int, layer: int, keep: float) -> Tensor:
    """Returns 1 / keep where a value is kept, and 0 elsewhere, as a factor of x, (C, ...)."""
    chosen = kept(seed, layer, x.shape[1], math.prod(x.shape[2:]), keep, x.device)
    return chosen.to(accumulator(x)).mul_(1 / keep).view(x.shape[1:])


def _along(x: Tensor, seed: int, layer: int, skip: float) -> Tensor:
    """Returns the weights as a factor of x, (C, 1, ...)."""
    weights = channel_weights(seed, layer, x.shape[1], skip, x.device)
    return weights.to(accumulator(x)).view(-1, *[1] * (x.dim() - 2))

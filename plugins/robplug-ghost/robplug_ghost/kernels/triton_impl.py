"""The kernels in Triton, for CUDA: same names, arguments and results as in ``reference.py``.

A tensor is (N, C, P). A tile has some channels and some positions of one sample; which of the two is the longer side
follows the strides. Weights and masks come from Philox in registers. The mask of a tile is drawn once for a share of
the samples. Offsets into a tensor are int64.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from robplug_ghost.kernels.reference import DROPOUT, SKIP, accumulator, empty, single, threshold

TILE = 1024  # values
PROGRAMS = 2048  # wanted in a launch that shares out samples

SKIP_KIND, DROPOUT_KIND = tl.constexpr(SKIP), tl.constexpr(DROPOUT)


@triton.jit
def _place(channels, positions, COLS: tl.constexpr, ROWS: tl.constexpr):
    """Returns sample (int64) or share of samples, and the first channel and position of the tile."""
    across, along = tl.cdiv(channels, COLS), tl.cdiv(positions, ROWS)
    tile = tl.program_id(0) % (across * along)
    sample = (tl.program_id(0) // (across * along)).to(tl.int64)
    return sample, (tile // along) * COLS, (tile % along) * ROWS


@triton.jit
def _offsets(sample, channel, position, stride_n, stride_c, stride_p):
    row = sample * stride_n + channel.to(tl.int64) * stride_c
    return row[:, None] + (position.to(tl.int64) * stride_p)[None, :]


@triton.jit
def _weights(seed, layer, channel, WIDTH: tl.constexpr):
    """Returns a float32 weight for each channel; see ``reference.channel_weights`` for the rounding."""
    none = channel * 0
    a, b, c, d = tl.philox(seed, channel // 4, none, none + layer, none + SKIP_KIND)
    word = channel % 4
    bits = tl.where(word == 0, a, tl.where(word == 1, b, tl.where(word == 2, c, d)))
    symmetric = (2 * (bits >> 8).to(tl.int32) - 16777215).to(tl.float64) * (1.0 / 16777216.0)
    return (1.0 + WIDTH * symmetric).to(tl.float32)


@triton.jit
def _factors(
    seed, layer, channel, first, LIMIT: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr
):
    """Returns for each channel and position 0, or SCALE where it is kept."""
    block = first // 4 + tl.arange(0, ROWS // 4)
    none = channel[:, None] * 0 + block[None, :] * 0
    a, b, c, d = tl.philox(seed, none + block[None, :], none + channel[:, None], none + layer, none + DROPOUT_KIND)
    words = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    return ((words >> 8).to(tl.int32) < LIMIT).to(ACC) * SCALE


@triton.jit(do_not_specialize=["seed", "layer"])
def _erode_add_kernel(
    shortcut, residual, out, seed, layer, channels, positions,
    s_n, s_c, s_p, r_n, r_c, r_p, o_n, o_c, o_p,
    WIDTH: tl.constexpr, RELU: tl.constexpr, ACC: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    n, column, row = _place(channels, positions, COLS, ROWS)
    c, p = column + tl.arange(0, COLS), row + tl.arange(0, ROWS)
    inside = (c < channels)[:, None] & (p < positions)[None, :]
    w = _weights(seed, layer, c, WIDTH).to(ACC)[:, None]
    s = tl.load(shortcut + _offsets(n, c, p, s_n, s_c, s_p), mask=inside, other=0.0).to(ACC)
    r = tl.load(residual + _offsets(n, c, p, r_n, r_c, r_p), mask=inside, other=0.0).to(ACC)
    total = w * s + r
    if RELU:
        total = tl.where(total <= 0, 0.0, total)  # a NaN stays
    tl.store(out + _offsets(n, c, p, o_n, o_c, o_p), total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed", "layer"])
def _erode_add_backward_kernel(
    g, out, grad_shortcut, grad_residual, seed, layer, channels, positions,
    g_n, g_c, g_p, o_n, o_c, o_p, s_n, s_c, s_p, r_n, r_c, r_p,
    WIDTH: tl.constexpr, ACC: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    n, column, row = _place(channels, positions, COLS, ROWS)
    c, p = column + tl.arange(0, COLS), row + tl.arange(0, ROWS)
    inside = (c < channels)[:, None] & (p < positions)[None, :]
    w = _weights(seed, layer, c, WIDTH).to(ACC)[:, None]
    up = tl.load(g + _offsets(n, c, p, g_n, g_c, g_p), mask=inside, other=0.0).to(ACC)
    value = tl.load(out + _offsets(n, c, p, o_n, o_c, o_p), mask=inside, other=0.0)
    up = tl.where(value <= 0, 0.0, up)
    tl.store(grad_residual + _offsets(n, c, p, r_n, r_c, r_p), up.to(grad_residual.dtype.element_ty), mask=inside)
    up *= w
    tl.store(grad_shortcut + _offsets(n, c, p, s_n, s_c, s_p), up.to(grad_shortcut.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed", "layer"])
def _erode_scale_kernel(
    x, out, seed, layer, channels, positions, x_n, x_c, x_p, o_n, o_c, o_p,
    WIDTH: tl.constexpr, ACC: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    n, column, row = _place(channels, positions, COLS, ROWS)
    c, p = column + tl.arange(0, COLS), row + tl.arange(0, ROWS)
    inside = (c < channels)[:, None] & (p < positions)[None, :]
    value = tl.load(x + _offsets(n, c, p, x_n, x_c, x_p), mask=inside, other=0.0).to(ACC)
    value *= _weights(seed, layer, c, WIDTH).to(ACC)[:, None]
    tl.store(out + _offsets(n, c, p, o_n, o_c, o_p), value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed", "layer"])
def _erode_dropout_kernel(
    x, out, seed, layer, channels, positions, samples, shares, x_n, x_c, x_p, o_n, o_c, o_p,
    LIMIT: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    share, column, row = _place(channels, positions, COLS, ROWS)
    c, p = column + tl.arange(0, COLS), row + tl.arange(0, ROWS)
    inside = (c < channels)[:, None] & (p < positions)[None, :]
    factor = _factors(seed, layer, c, row, LIMIT, SCALE, ROWS, ACC)
    for n in range(share, samples, shares):
        value = tl.load(x + _offsets(n, c, p, x_n, x_c, x_p), mask=inside, other=0.0).to(ACC) * factor
        tl.store(out + _offsets(n, c, p, o_n, o_c, o_p), value.to(out.dtype.element_ty), mask=inside)


def erode_add(
    shortcut: Tensor, residual: Tensor, seed: int, layer: int, skip: float, relu: bool, tile: int = TILE
) -> Tensor:
    """See `robplug_ghost.kernels.reference.erode_add`."""
    out = empty(residual)
    _launch(_erode_add_kernel, tile, (shortcut, residual, out), (seed, layer), WIDTH=single(skip), RELU=relu)
    return out


def erode_add_backward(
    g: Tensor, out: Tensor, seed: int, layer: int, skip: float, tile: int = TILE
) -> tuple[Tensor, Tensor]:
    """See `robplug_ghost.kernels.reference.erode_add_backward`."""
    grads = empty(out), empty(out)
    _launch(_erode_add_backward_kernel, tile, (g, out, *grads), (seed, layer), WIDTH=single(skip))
    return grads


def erode_scale(x: Tensor, seed: int, layer: int, skip: float, tile: int = TILE) -> Tensor:
    """See `robplug_ghost.kernels.reference.erode_scale`."""
    out = empty(x)
    _launch(_erode_scale_kernel, tile, (x, out), (seed, layer), WIDTH=single(skip))
    return out


def erode_dropout(x: Tensor, seed: int, layer: int, keep: float, tile: int = TILE) -> Tensor:
    """See `robplug_ghost.kernels.reference.erode_dropout`."""
    out = empty(x)
    constants = {"LIMIT": threshold(keep), "SCALE": 1 / keep}
    _launch(_erode_dropout_kernel, tile, (x, out), (seed, layer), share_samples=True, **constants)
    return out


def _launch(
    kernel: Any,
    tile: int,
    tensors: tuple[Tensor, ...],
    numbers: tuple[int, int],
    share_samples: bool = False,
    **constants: Any,
) -> None:
    """Launches a program for each tile of each sample, or for each tile and share of samples."""
    flat = [tensor.flatten(2) if tensor.dim() > 2 else tensor[:, :, None] for tensor in tensors]
    out = flat[-1]
    samples, channels, positions = out.shape
    if not out.numel():
        return
    cols, rows = _sides(out, tile)
    tiles = triton.cdiv(channels, cols) * triton.cdiv(positions, rows)
    shares = min(samples, triton.cdiv(PROGRAMS, tiles)) if share_samples else samples
    sides = (channels, positions, samples, shares) if share_samples else (channels, positions)
    strides = [stride for tensor in flat for stride in tensor.stride()]
    acc = tl.float64 if accumulator(out) == torch.float64 else tl.float32
    with torch.cuda.device_of(out):
        kernel[(tiles * shares,)](*flat, *numbers, *sides, *strides, **constants, ACC=acc, COLS=cols, ROWS=rows)


def _sides(out: Tensor, tile: int) -> tuple[int, int]:
    """Returns channels and positions of a tile, powers of two; neighbours in memory fill it first, at least 4 rows."""
    channels, positions = (triton.next_power_of_2(size) for size in out.shape[1:])
    if out.stride(1) == 1 and positions > 1:
        cols = min(channels, tile // 4)
        return cols, tile // cols
    rows = min(max(positions, 4), tile)
    return tile // rows, rows

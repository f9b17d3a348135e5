"""The kernels in Triton, for CUDA: same names, arguments and results as in ``reference.py``.

A group is a table: a row for each value of a channel, a column for each channel. A program has a block of columns of
one group and one of several equal shares of its rows, through which it goes in tiles. Sums over rows leave as one
partial result a share, which each program of the second launch puts together for itself, in a fixed order: two launches
forward, two backward, nothing atomic. Row numbers within a group are int32, offsets into a batch int64.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from robplug_advprop.kernels.reference import accumulator

TILE = 2048  # values
COLUMNS = 32  # of a tile where channels are neighbours in memory; 1 where they are not
PROGRAMS = 512  # wanted in a launch


@triton.jit
def _place(starts, channels, length, SHARES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Returns group, share, channels and their existence, first sample, rows of the group, and first and last tile."""
    share, group = tl.program_id(0), tl.program_id(2)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    first, after = tl.load(starts + group), tl.load(starts + group + 1)
    rows = ((after - first) * length).to(tl.int32)
    tiles = tl.cdiv(tl.cdiv(rows, ROWS), SHARES)
    return group, share, col, col < channels, first, rows, share * tiles, (share + 1) * tiles


@triton.jit
def _offsets(row, col, first, length, stride_n, stride_c, stride_l):
    sample, place = first + row // length, row % length
    along = sample * stride_n + place.to(tl.int64) * stride_l
    return along[:, None] + (col.to(tl.int64) * stride_c)[None, :]


@triton.jit
def _cells(tile, rows, exists, ROWS: tl.constexpr):
    """Returns the rows of a tile and which of its cells exist."""
    row = tile * ROWS + tl.arange(0, ROWS)
    return row, (row < rows)[:, None] & exists[None, :]


@triton.jit
def _partial(pointer, group, share, which, col, channels, SHARES: tl.constexpr, KINDS: tl.constexpr):
    """Returns where the partial results of a share are: (K, SHARES, KINDS, C)."""
    return pointer + ((group * SHARES + share).to(tl.int64) * KINDS + which) * channels + col


@triton.jit
def _moments_kernel(
    x, starts, partial, channels, length, x_n, x_c, x_l,
    SHARES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    group, share, col, exists, first, rows, tile, end = _place(starts, channels, length, SHARES, ROWS, COLS)
    seen = tl.zeros([1], dtype=ACC)
    mean, squares = tl.zeros([COLS], dtype=ACC), tl.zeros([COLS], dtype=ACC)
    for t in range(tile, end):
        row, inside = _cells(t, rows, exists, ROWS)
        value = tl.load(x + _offsets(row, col, first, length, x_n, x_c, x_l), mask=inside, other=0.0).to(ACC)
        new = tl.sum((row < rows).to(ACC), axis=0)
        own = tl.sum(value, axis=0) / tl.maximum(new, 1.0)
        off = tl.where(inside, value - own[None, :], 0.0)
        # Chan et al. 1979: no difference of large sums
        apart, total = own - mean, tl.maximum(seen + new, 1.0)
        mean += apart * (new / total)
        squares += tl.sum(off * off, axis=0) + apart * apart * (seen * new / total)
        seen += new
    tl.store(_partial(partial, group, share, 0, col, channels, SHARES, 3), seen + tl.zeros([COLS], ACC), mask=exists)
    tl.store(_partial(partial, group, share, 1, col, channels, SHARES, 3), mean, mask=exists)
    tl.store(_partial(partial, group, share, 2, col, channels, SHARES, 3), squares, mask=exists)


@triton.jit
def _normalise_kernel(
    x, starts, partial, weight, bias, out, mean_out, var_out, channels, length, eps, x_n, x_c, x_l, o_n, o_c, o_l,
    RELU: tl.constexpr, SHARES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    group, share, col, exists, first, rows, tile, end = _place(starts, channels, length, SHARES, ROWS, COLS)
    every, there = tl.arange(0, SHARES)[:, None], exists[None, :]
    seen = tl.load(_partial(partial, group, every, 0, col[None, :], channels, SHARES, 3), mask=there, other=0.0)
    means = tl.load(_partial(partial, group, every, 1, col[None, :], channels, SHARES, 3), mask=there, other=0.0)
    squares = tl.load(_partial(partial, group, every, 2, col[None, :], channels, SHARES, 3), mask=there, other=0.0)
    count = rows.to(ACC)
    mean = tl.sum(seen * means, axis=0) / count
    off = means - mean[None, :]
    total = tl.sum(squares + seen * off * off, axis=0)
    own = group.to(tl.int64) * channels + col
    if share == 0:
        tl.store(mean_out + own, mean, mask=exists)
        tl.store(var_out + own, total / (count - 1), mask=exists)
    scale = tl.load(weight + own, mask=exists, other=0.0) / tl.sqrt(total / count + eps)
    shift = tl.load(bias + own, mask=exists, other=0.0)
    for t in range(tile, end):
        row, inside = _cells(t, rows, exists, ROWS)
        value = tl.load(x + _offsets(row, col, first, length, x_n, x_c, x_l), mask=inside, other=0.0).to(ACC)
        value = (value - mean[None, :]) * scale[None, :] + shift[None, :]
        if RELU:
            value = tl.where(value <= 0, 0.0, value)  # a NaN stays
        at = out + _offsets(row, col, first, length, o_n, o_c, o_l)
        tl.store(at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _upstream(g, out, at, at_out, inside, RELU: tl.constexpr, ACC: tl.constexpr):
    """Returns the gradient in front of the ReLU, if there is one."""
    upstream = tl.load(g + at, mask=inside, other=0.0).to(ACC)
    if RELU:
        upstream = tl.where(tl.load(out + at_out, mask=inside, other=0.0) > 0, upstream, 0.0)
    return upstream


@triton.jit
def _statistics(mean, var, own, exists, rows, eps, ACC: tl.constexpr):
    """Returns mean and 1 / sqrt(variance + eps)."""
    count = rows.to(ACC)
    biased = tl.load(var + own, mask=exists, other=1.0) * ((count - 1) / count)
    return tl.load(mean + own, mask=exists, other=0.0), 1 / tl.sqrt(biased + eps)


@triton.jit
def _sums_kernel(
    g, x, out, starts, partial, mean, var, channels, length, eps, g_n, g_c, g_l, x_n, x_c, x_l, o_n, o_c, o_l,
    RELU: tl.constexpr, SHARES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    group, share, col, exists, first, rows, tile, end = _place(starts, channels, length, SHARES, ROWS, COLS)
    centre, inverse = _statistics(mean, var, group.to(tl.int64) * channels + col, exists, rows, eps, ACC)
    by_bias, by_weight = tl.zeros([COLS], dtype=ACC), tl.zeros([COLS], dtype=ACC)
    for t in range(tile, end):
        row, inside = _cells(t, rows, exists, ROWS)
        at, at_out = _offsets(row, col, first, length, g_n, g_c, g_l), _offsets(row, col, first, length, o_n, o_c, o_l)
        upstream = _upstream(g, out, at, at_out, inside, RELU, ACC)
        value = tl.load(x + _offsets(row, col, first, length, x_n, x_c, x_l), mask=inside, other=0.0).to(ACC)
        by_bias += tl.sum(upstream, axis=0)
        by_weight += tl.sum(upstream * (value - centre[None, :]), axis=0)
    tl.store(_partial(partial, group, share, 0, col, channels, SHARES, 2), by_bias, mask=exists)
    tl.store(_partial(partial, group, share, 1, col, channels, SHARES, 2), by_weight * inverse, mask=exists)


@triton.jit
def _gradient_kernel(
    g, x, out, starts, partial, weight, mean, var, grad_x, grad_weight, grad_bias, channels, length, eps,
    g_n, g_c, g_l, x_n, x_c, x_l, o_n, o_c, o_l, d_n, d_c, d_l,
    RELU: tl.constexpr, SHARES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    group, share, col, exists, first, rows, tile, end = _place(starts, channels, length, SHARES, ROWS, COLS)
    every, there = tl.arange(0, SHARES)[:, None], exists[None, :]
    sums = tl.load(_partial(partial, group, every, 0, col[None, :], channels, SHARES, 2), mask=there, other=0.0)
    by_bias = tl.sum(sums, axis=0)
    sums = tl.load(_partial(partial, group, every, 1, col[None, :], channels, SHARES, 2), mask=there, other=0.0)
    by_weight = tl.sum(sums, axis=0)
    own = group.to(tl.int64) * channels + col
    if share == 0:
        tl.store(grad_weight + own, by_weight, mask=exists)
        tl.store(grad_bias + own, by_bias, mask=exists)
    centre, inverse = _statistics(mean, var, own, exists, rows, eps, ACC)
    scale = tl.load(weight + own, mask=exists, other=0.0) * inverse
    by_bias, by_weight = by_bias / rows.to(ACC), by_weight * inverse / rows.to(ACC)
    for t in range(tile, end):
        row, inside = _cells(t, rows, exists, ROWS)
        at, at_out = _offsets(row, col, first, length, g_n, g_c, g_l), _offsets(row, col, first, length, o_n, o_c, o_l)
        upstream = _upstream(g, out, at, at_out, inside, RELU, ACC)
        value = tl.load(x + _offsets(row, col, first, length, x_n, x_c, x_l), mask=inside, other=0.0).to(ACC)
        change = upstream - by_bias[None, :] - (value - centre[None, :]) * by_weight[None, :]
        at = grad_x + _offsets(row, col, first, length, d_n, d_c, d_l)
        tl.store(at, (change * scale[None, :]).to(grad_x.dtype.element_ty), mask=inside)


def mixture_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    sizes: Sequence[int],
    eps: float,
    relu: bool,
    tile: tuple[int, int] | None = None,
    shares: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `robplug_advprop.kernels.reference.mixture_batch_norm`; ``tile`` and ``shares`` change no more than speed."""
    out, mean, var = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
    table, result, work = _table(x), _table(out), _Work(x, sizes, tile, shares)
    partial = weight.new_empty(len(sizes), work.shares, 3, x.shape[1])
    tensors = (partial, weight.contiguous(), bias.contiguous(), result, mean, var)
    work.launch(_moments_kernel, (table, work.starts, partial), (), (table,))
    work.launch(_normalise_kernel, (table, work.starts, *tensors), (eps,), (table, result), RELU=relu)
    return _into(out, result), mean, var


def mixture_batch_norm_backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    out: Tensor | None,
    sizes: Sequence[int],
    eps: float,
    tile: tuple[int, int] | None = None,
    shares: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `robplug_advprop.kernels.reference.mixture_batch_norm_backward`; for the last two see above."""
    by_x, by_weight, by_bias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
    result, work = _table(by_x), _Work(x, sizes, tile, shares)
    tables = (_table(g), _table(x), _table(x if out is None else out))  # without ReLU, nobody reads the third
    statistics = (mean.contiguous(), var.contiguous())
    partial = weight.new_empty(len(sizes), work.shares, 2, x.shape[1])
    relu = out is not None
    work.launch(_sums_kernel, (*tables, work.starts, partial, *statistics), (eps,), tables, RELU=relu)
    tensors = (*tables, work.starts, partial, weight.contiguous(), *statistics, result, by_weight, by_bias)
    work.launch(_gradient_kernel, tensors, (eps,), (*tables, result), RELU=relu)
    return _into(by_x, result), by_weight, by_bias


class _Work:
    """How a batch is divided among programs.

    Attributes:
        starts: (K + 1,) int64, the first sample of each group, and the number of samples.
        shares: of the rows of a group, a power of two.
    """

    def __init__(self, x: Tensor, sizes: Sequence[int], tile: tuple[int, int] | None, shares: int | None) -> None:
        channels, self.length = x.shape[1], x.shape[2:].numel()
        if max(sizes) * self.length >= 2**31 - TILE:
            raise ValueError(f"expected groups of fewer than 2**31 values a channel, got {max(sizes) * self.length}")
        cols = min(COLUMNS, triton.next_power_of_2(channels)) if x.stride(1) == 1 else 1
        self.rows, self.cols = tile or (TILE // cols, cols)
        self.channels, self.blocks, self.groups = channels, triton.cdiv(channels, self.cols), len(sizes)
        tiles = triton.cdiv(max(sizes) * self.length, self.rows)
        wanted = min(tiles, triton.cdiv(PROGRAMS, self.blocks * self.groups))
        self.shares = shares or triton.next_power_of_2(wanted)
        self.starts = _starts(tuple(sizes), x.device)
        self.acc = tl.float64 if accumulator(x) == torch.float64 else tl.float32

    def launch(
        self, kernel: Any, tensors: Sequence[Tensor], numbers: Sequence[float], tables: Sequence[Tensor], **options: Any
    ) -> None:
        """Launches a kernel that takes tensors, channels, length, numbers, the tables' strides and the options."""
        strides = [stride for table in tables for stride in table.stride()]
        constants = {"SHARES": self.shares, "ROWS": self.rows, "COLS": self.cols, "ACC": self.acc}
        grid = (self.shares, self.blocks, self.groups)
        with torch.cuda.device_of(tensors[0]):
            kernel[grid](*tensors, self.channels, self.length, *numbers, *strides, **options, **constants)


@functools.lru_cache(maxsize=64)
def _starts(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *sizes], device=device).cumsum(0)


def _table(x: Tensor) -> Tensor:
    """Returns (N, C, L), which is a view wherever the last dimensions can be one."""
    return x.unsqueeze(2) if x.dim() == 2 else x.flatten(2)


def _into(out: Tensor, table: Tensor) -> Tensor:
    """Returns out with the values of its table, which may be a copy."""
    return out if table.data_ptr() == out.data_ptr() else out.copy_(table.view(out.shape))

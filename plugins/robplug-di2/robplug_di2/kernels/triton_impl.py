"""The kernels in Triton, for CUDA: same names, arguments and results as in ``reference.py``.

A program works on BLOCK pixels of one image, those of the canvas forwards and those of the image backwards, where
each gathers from the lines that it went to: no atomic additions. Offsets into a batch are int64, coordinates
int32 fractions.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from robplug_di2.kernels.reference import accumulator

BLOCK = 512


@triton.jit
def _pixels(height, width, BLOCK: tl.constexpr):
    """Returns the image (int64), and row, column and existence of the block's pixels."""
    blocks = tl.cdiv(height * width, BLOCK)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    return n, pixel // width, pixel % width, pixel < height * width


@triton.jit
def _at(row, col, stride_h, stride_w):
    return row.to(tl.int64) * stride_h + col.to(tl.int64) * stride_w


@triton.jit
def _source(line, size, source, ACC: tl.constexpr, BILINEAR: tl.constexpr):
    """Returns where a line of the resized image comes from: two lines of the image and the weight of the second."""
    line = tl.minimum(tl.maximum(line, 0), tl.maximum(size, 1) - 1)
    if BILINEAR:
        unit = 2 * tl.maximum(size, 1)
        position = tl.maximum((2 * line + 1) * source - size, 0)
        first = position // unit
        weight = (position - first * unit).to(ACC) / unit.to(ACC)
    else:
        first = line * source // tl.maximum(size, 1)
        weight = (first * 0).to(ACC)
    first = tl.minimum(tl.maximum(first, 0), source - 1)
    return first, tl.minimum(first + 1, source - 1), weight


@triton.jit
def _destinations(line, size, source, BILINEAR: tl.constexpr):
    """Returns the first line of the resized image that may come from a line of the image, and how many may."""
    if BILINEAR:
        # those strictly between the lines before and after it: an interval of length 2 size / source
        first = tl.maximum((2 * line - 1) * size + source, 0) // (2 * source)
        count = tl.cdiv(2 * size, source)
    else:
        first = (line * size + source - 1) // source
        count = tl.cdiv(size, source)
    return first, count


@triton.jit
def _share(line, here, size, source, ACC: tl.constexpr, BILINEAR: tl.constexpr):
    """Returns with which weight a line of the resized image comes from the line ``here`` of the image."""
    first, second, weight = _source(line, size, source, ACC, BILINEAR)
    share = tl.where(first == here, 1 - weight, 0.0) + tl.where(second == here, weight, 0.0)
    return tl.where((line >= 0) & (line < size), share, 0.0)


@triton.jit
def _resize_pad_kernel(
    x, size, offset, out, channels, in_h, in_w, height, width, fill,
    x_n, x_c, x_h, x_w, s_n, s_k, t_n, t_k, o_n, o_c, o_h, o_w,
    BILINEAR: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    n, row, col, inside = _pixels(height, width, BLOCK)
    size_h, size_w = tl.load(size + n * s_n).to(tl.int32), tl.load(size + n * s_n + s_k).to(tl.int32)
    row_r = row - tl.load(offset + n * t_n).to(tl.int32)
    col_r = col - tl.load(offset + n * t_n + t_k).to(tl.int32)
    shown = inside & (row_r >= 0) & (row_r < size_h) & (col_r >= 0) & (col_r < size_w)
    upper, lower, down = _source(row_r, size_h, in_h, ACC, BILINEAR)
    left, right, along = _source(col_r, size_w, in_w, ACC, BILINEAR)
    x += n * x_n
    out += n * o_n + _at(row, col, o_h, o_w)
    for _c in range(channels):
        value = tl.load(x + _at(upper, left, x_h, x_w), mask=shown, other=0.0).to(ACC)
        if BILINEAR:
            ur = tl.load(x + _at(upper, right, x_h, x_w), mask=shown, other=0.0).to(ACC)
            ll = tl.load(x + _at(lower, left, x_h, x_w), mask=shown, other=0.0).to(ACC)
            lr = tl.load(x + _at(lower, right, x_h, x_w), mask=shown, other=0.0).to(ACC)
            value += down * (ll - value)
            value += along * (ur + down * (lr - ur) - value)
        value = tl.where(shown, value, fill)
        tl.store(out, value.to(out.dtype.element_ty), mask=inside)
        x, out = x + x_c, out + o_c


@triton.jit
def _resize_pad_adjoint_kernel(
    g, size, offset, out, channels, in_h, in_w, height, width,
    g_n, g_c, g_h, g_w, s_n, s_k, t_n, t_k, o_n, o_c, o_h, o_w,
    BILINEAR: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    # g is a canvas of in_h rows and in_w columns, out has the height and width of the images
    n, row, col, inside = _pixels(height, width, BLOCK)
    size_h, size_w = tl.load(size + n * s_n).to(tl.int32), tl.load(size + n * s_n + s_k).to(tl.int32)
    top, left = tl.load(offset + n * t_n).to(tl.int32), tl.load(offset + n * t_n + t_k).to(tl.int32)
    first_row, rows = _destinations(row, size_h, height, BILINEAR)
    first_col, cols = _destinations(col, size_w, width, BILINEAR)
    g += n * g_n
    out += n * o_n + _at(row, col, o_h, o_w)
    for _c in range(channels):
        total = tl.zeros([BLOCK], dtype=ACC)
        for i in range(rows):
            row_r = first_row + i
            by_row = _share(row_r, row, size_h, height, ACC, BILINEAR)
            row_q = row_r + top
            seen_row = inside & (by_row != 0) & (row_q >= 0) & (row_q < in_h)
            for j in range(cols):
                col_r = first_col + j
                share = by_row * _share(col_r, col, size_w, width, ACC, BILINEAR)
                col_q = col_r + left
                seen = seen_row & (share != 0) & (col_q >= 0) & (col_q < in_w)
                here = tl.load(g + _at(row_q, col_q, g_h, g_w), mask=seen, other=0.0).to(ACC)
                total += share * here
        tl.store(out, total.to(out.dtype.element_ty), mask=inside)
        g, out = g + g_c, out + o_c


def resize_pad(
    x: Tensor, size: Tensor, offset: Tensor, height: int, width: int, bilinear: bool, fill: float, block: int = BLOCK
) -> Tensor:
    """See `robplug_di2.kernels.reference.resize_pad`."""
    out = x.new_empty((*x.shape[:2], height, width))
    _launch(_resize_pad_kernel, block, (x, size, offset, out), (fill,), bilinear)
    return out


def resize_pad_adjoint(
    g: Tensor, size: Tensor, offset: Tensor, height: int, width: int, bilinear: bool, block: int = BLOCK
) -> Tensor:
    """See `robplug_di2.kernels.reference.resize_pad_adjoint`."""
    out = g.new_empty((*g.shape[:2], height, width))
    _launch(_resize_pad_adjoint_kernel, block, (g, size, offset, out), (), bilinear)
    return out


def _launch(kernel: Any, block: int, tensors: tuple[Tensor, ...], rest: tuple[float, ...], bilinear: bool) -> None:
    """Launches a program for each block of pixels of each image of the last tensor, which is the result."""
    first, out = tensors[0], tensors[-1]
    programs = len(out) * -(-out.shape[2] * out.shape[3] // block)
    sides = (*first.shape[1:], *out.shape[2:])
    strides = [stride for tensor in tensors for stride in tensor.stride()]
    acc = tl.float64 if accumulator(out) == torch.float64 else tl.float32
    if programs:
        with torch.cuda.device_of(out):
            kernel[(programs,)](*tensors, *sides, *rest, *strides, BILINEAR=bilinear, ACC=acc, BLOCK=block)

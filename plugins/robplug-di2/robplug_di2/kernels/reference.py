"""The definition of the kernels in plain PyTorch, forward and backward; what runs wherever Triton does not.

Coordinates are exact fractions of integers. Values are computed in float32, or in float64 where they are float64, and
rounded once at the end. The pixels of an image stand in one line, as one gather along the last axis is faster than
one along rows and one along columns; behind the last is the pixel ``nowhere``, from which the border comes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator(x: Tensor) -> torch.dtype:
    """Returns the dtype to compute in: float32, or float64 where the tensor has it."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def resize_pad(x: Tensor, size: Tensor, offset: Tensor, height: int, width: int, bilinear: bool, fill: float) -> Tensor:
    """Returns (N, C, height, width): each image resized to its size, at its offset on a canvas of the value fill."""
    dtype = accumulator(x)
    rows, cols = _taps(size, offset, x.shape[2:], (height, width), bilinear)
    pixels = torch.cat([x.to(dtype).flatten(2), x.new_full((*x.shape[:2], 1), fill, dtype=dtype)], dim=2)

    def pick(row: Tensor, col: Tensor) -> Tensor:
        return pixels.gather(2, _index(row, col, pixels)).view(*x.shape[:2], height, width)

    out = pick(rows.first, cols.first)
    if bilinear:
        down, along = rows.weight[:, None, :, None].to(dtype), cols.weight[:, None, None, :].to(dtype)
        out.lerp_(pick(rows.first, cols.second), along)
        out.lerp_(pick(rows.second, cols.first).lerp_(pick(rows.second, cols.second), along), down)
    return out.to(x.dtype)


def resize_pad_adjoint(g: Tensor, size: Tensor, offset: Tensor, height: int, width: int, bilinear: bool) -> Tensor:
    """Returns (N, C, height, width): the gradient of sum(g * resize_pad(x)) with respect to x of that height and width.

    The canvas has the size of g.
    """
    dtype = accumulator(g)
    rows, cols = _taps(size, offset, (height, width), g.shape[2:], bilinear)
    pixels = g.new_zeros((*g.shape[:2], height * width + 1), dtype=dtype)

    def put(row: Tensor, col: Tensor, values: Tensor) -> None:
        pixels.scatter_add_(2, _index(row, col, pixels), values.flatten(2))

    upper = g.to(dtype)
    if bilinear:
        down, along = rows.weight[:, None, :, None].to(dtype), cols.weight[:, None, None, :].to(dtype)
        lower = upper * down
        upper = upper - lower
        for row, values in ((rows.first, upper), (rows.second, lower)):
            right = values * along
            put(row, cols.second, right)
            put(row, cols.first, values - right)
    else:
        put(rows.first, cols.first, upper)
    return pixels[:, :, :-1].to(g.dtype).contiguous().view(*g.shape[:2], height, width)


class _Taps:
    """Where the lines (rows or columns) of a canvas come from.

    Line q of an image resized from ``source`` to ``size`` lines comes from floor(q * source / size) or, bilinearly,
    from (q + 1/2) * source / size - 1/2, clamped to the image.

    Attributes:
        first: (N, lines) where a line of the image begins in the line of its pixels, or nowhere.
        second: (N, lines) likewise for the next one.
        weight: (N, lines) float64 weight of the second; 0 where only the nearest counts.
    """

    def __init__(
        self, size: Tensor, offset: Tensor, source: int, canvas: int, bilinear: bool, stride: int, nowhere: int
    ) -> None:
        line = torch.arange(canvas, device=size.device) - offset
        shown = (line >= 0) & (line < size)
        line, size = torch.where(shown, line, 0), size.clamp_min(1)
        if bilinear:
            position = ((2 * line + 1) * source - size).clamp_min(0)  # in units of 1 / (2 size)
            first = position // (2 * size)
            self.weight = (position - first * 2 * size).double() / (2 * size)
        else:
            first = line * source // size
            self.weight = torch.zeros_like(first)
        self.first = torch.where(shown, first * stride, nowhere)
        self.second = torch.where(shown, (first + 1).clamp_max(source - 1) * stride, nowhere)


def _taps(
    size: Tensor, offset: Tensor, source: tuple[int, ...], canvas: tuple[int, ...], bilinear: bool
) -> tuple[_Taps, _Taps]:
    """Returns the taps of rows and columns."""
    # one row for all where one was expanded to all: the indices are then made once
    size, offset = (pair[:1] if pair.stride(0) == 0 else pair for pair in (size, offset))
    nowhere, strides = source[0] * source[1], (source[1], 1)
    rows, cols = (
        _Taps(size[:, k, None], offset[:, k, None], source[k], canvas[k], bilinear, strides[k], nowhere) for k in (0, 1)
    )
    return rows, cols


def _index(row: Tensor, col: Tensor, pixels: Tensor) -> Tensor:
    """Returns (N, C, canvas's pixels) the place of each in the line of an image's pixels."""
    index = (row[:, :, None] + col[:, None, :]).clamp_max_(pixels.shape[2] - 1).flatten(1)
    return index[:, None].expand(*pixels.shape[:2], -1)

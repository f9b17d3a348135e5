"""The definition of the kernels in plain PyTorch, forward and backward; what runs wherever Triton does not.

Coordinates are exact fractions of integers. Values are computed in float32, or in float64 where they are float64, and
rounded once at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator(x: Tensor) -> torch.dtype:
    """Returns the dtype to compute in: float32, or float64 where the tensor has it."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def resize_pad(x: Tensor, size: Tensor, offset: Tensor, height: int, width: int, bilinear: bool, fill: float) -> Tensor:
    """Returns (N, C, height, width): each image resized to its size, at its offset on a canvas of the value fill."""
    rows = _taps(size[:, 0], offset[:, 0], x.shape[2], height, bilinear)
    cols = _taps(size[:, 1], offset[:, 1], x.shape[3], width, bilinear)
    out = _pick(_pick(x.to(accumulator(x)), rows, 2), cols, 3)
    shown = rows.shown[:, None, :, None] & cols.shown[:, None, None, :]
    return out.masked_fill_(~shown, fill).to(x.dtype)


def resize_pad_adjoint(g: Tensor, size: Tensor, offset: Tensor, height: int, width: int, bilinear: bool) -> Tensor:
    """Returns (N, C, height, width): the gradient of sum(g * resize_pad(x)) with respect to x of that height and width.

    The canvas has the size of g.
    """
    rows = _taps(size[:, 0], offset[:, 0], height, g.shape[2], bilinear)
    cols = _taps(size[:, 1], offset[:, 1], width, g.shape[3], bilinear)
    shown = rows.shown[:, None, :, None] & cols.shown[:, None, None, :]
    upstream = g.to(accumulator(g)).masked_fill(~shown, 0.0)
    return _put(_put(upstream, cols, 3, width), rows, 2, height).to(g.dtype)


class _Taps:
    """Where the lines (rows or columns) of a canvas come from.

    Attributes:
        first: (N, lines) index of a line of the image.
        second: (N, lines) index of the next one, or None for the nearest line alone.
        weight: (N, lines) float64 weight of the second.
        shown: (N, lines) bool, whether there is a line of the image at all.
    """

    def __init__(self, first: Tensor, second: Tensor | None, weight: Tensor | None, shown: Tensor) -> None:
        self.first, self.second, self.weight, self.shown = first, second, weight, shown


def _taps(size: Tensor, offset: Tensor, source: int, canvas: int, bilinear: bool) -> _Taps:
    """Returns the taps of one axis.

    Line q of an image resized from ``source`` to ``size`` lines comes from floor(q * source / size) or, bilinearly,
    from (q + 1/2) * source / size - 1/2, clamped to the image.
    """
    size = size[:, None]
    line = torch.arange(canvas, device=size.device) - offset[:, None]
    shown = (line >= 0) & (line < size)
    line = torch.where(shown, line, torch.zeros_like(line))
    size = size.clamp_min(1)
    if not bilinear:
        return _Taps(line * source // size, None, None, shown)
    position = ((2 * line + 1) * source - size).clamp_min(0)  # in units of 1 / (2 size)
    first = position // (2 * size)
    weight = (position - first * 2 * size).double() / (2 * size)
    return _Taps(first, (first + 1).clamp_max(source - 1), weight, shown)


def _along(lines: Tensor, like: Tensor, dim: int) -> Tensor:
    """Returns (N, lines) as an index, or a weight, along an axis of images."""
    shape = [len(lines), 1, 1, 1]
    shape[dim] = lines.shape[1]
    full = list(like.shape)
    full[dim] = lines.shape[1]
    return lines.view(shape).expand(full)


def _pick(x: Tensor, taps: _Taps, dim: int) -> Tensor:
    first = x.gather(dim, _along(taps.first, x, dim))
    if taps.second is None or taps.weight is None:
        return first
    second = x.gather(dim, _along(taps.second, x, dim))
    return first.lerp_(second, _along(taps.weight.to(x.dtype), x, dim))


def _put(g: Tensor, taps: _Taps, dim: int, source: int) -> Tensor:
    """Adds each line to the lines that it came from."""
    shape = list(g.shape)
    shape[dim] = source
    out = g.new_zeros(shape)
    if taps.second is None or taps.weight is None:
        return out.scatter_add_(dim, _along(taps.first, g, dim), g)
    second = g * _along(taps.weight.to(g.dtype), g, dim)
    out.scatter_add_(dim, _along(taps.second, g, dim), second)
    return out.scatter_add_(dim, _along(taps.first, g, dim), g - second)

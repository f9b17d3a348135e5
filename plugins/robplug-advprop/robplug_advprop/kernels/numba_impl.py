"""The kernels for the CPU in single precision, forward and backward: which of them, and their arguments.

A batch is (N, C, P). Where the channels of its samples are rows of P values (NCHW), ``numba_rows`` has the kernels;
where its rows have C values (NHWC), ``numba_columns`` has. Sums that single precision could not hold are float64, and
results do not depend on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain

import torch
from torch import Tensor

from robplug_advprop.kernels import numba_columns, numba_columns_backward, numba_rows

Rows = Sequence[Tensor]


def mixture_batch_norm(
    x: Tensor,
    sizes: list[int],
    eps: float,
    relu: bool,
    momentum: Sequence[float],
    running: Sequence[Rows | None],
    weight: Rows,
    bias: Rows,
) -> tuple[Tensor, Tensor]:
    """Returns the result, and the K means and K 1 / sqrt(variance + eps), (2 K, C); updates the running statistics.

    Args:
        x: (N, C, ...), contiguous or channels last, as are results and gradients of its shape.
        sizes: of the K groups.
        eps: added to each variance.
        relu: whether a ReLU follows.
        momentum: of each group.
        running: mean and variance of each group, None where none are kept.
        weight: of each group.
        bias: likewise.
    """
    out, found = torch.empty_like(x), torch.empty(2 * len(sizes), x.shape[1], dtype=x.dtype, device=x.device)
    means, variances = (rows or [0] * len(sizes) for rows in running)
    groups = zip(_starts(sizes), sizes, weight, bias, means, variances, momentum, strict=True)
    floor = 0.0 if relu else -math.inf
    forward = numba_rows.forward if _has_rows(x) else numba_columns.forward
    forward(x, *_shape(x, sizes), x, out, found, eps, floor, *chain.from_iterable(groups))
    return out, found


def mixture_batch_norm_backward(
    g: Tensor, x: Tensor, out: Tensor | None, sizes: list[int], weight: Rows, found: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the gradients with respect to x, and to the K weights and K biases, (2 K, C).

    Args:
        g: of the result.
        x: what was normalised.
        out: the result if it went through a ReLU, which passes a gradient where it is positive; else None.
        sizes: of the K groups.
        weight: of each group.
        found: what the forward pass returned beside its result.
    """
    by_x, by_rows = torch.empty_like(x), torch.empty_like(found)
    gate = (x, -math.inf) if out is None else (out, 0.0)
    groups = chain.from_iterable(zip(_starts(sizes), sizes, weight, strict=True))
    backward = numba_rows.backward if _has_rows(x) else numba_columns_backward.backward
    backward(x, *_shape(x, sizes), g, x, *gate, found, by_x, by_rows, *groups)
    return by_x, by_rows


def _has_rows(x: Tensor) -> bool:
    """Returns whether channels of samples are rows."""
    return x.is_contiguous() and x.shape[2:].numel() > 1


def _shape(x: Tensor, sizes: list[int]) -> tuple[int, int, int]:
    return len(sizes), x.shape[1], math.prod(x.shape[2:])


def _starts(sizes: Iterable[int]) -> list[int]:
    return [0, *accumulate(sizes)][:-1]

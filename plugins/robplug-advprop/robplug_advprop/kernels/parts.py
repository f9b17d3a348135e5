"""Mixture batch norm on the CPU as the library's batch norm of each group.

Where channels are short or not next to each other, statistics cost no more than the calls around them. So this does
what splitting the batch does and no more: in one node of the graph, where results are written to where they belong, and
weights, biases and running statistics stay the separate rows that they are; for few values, where a node in Python
costs more than that saves, by splitting.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from robplug_advprop.kernels import reference

FEW = 2**21
"""Values below which splitting is the faster way."""


def normalised(
    x: Tensor,
    sizes: list[int],
    eps: float,
    relu: bool,
    momentum: Sequence[float],
    running: Sequence[Sequence[Tensor] | None],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
) -> Tensor:
    """Returns the result; updates the running statistics."""
    if x.numel() >= FEW:
        out: Tensor = MixtureBatchNorm.apply(x, sizes, eps, relu, momentum, running, *weight, *bias)
        return out
    means, variances = (rows or [None] * len(sizes) for rows in running)
    groups = zip(x.split(sizes), means, variances, weight, bias, momentum, strict=True)
    whole = torch.cat([F.batch_norm(*group, True, share, eps) for *group, share in groups])
    return whole.relu_() if relu else whole


def fits(
    x: Tensor, sizes: Sequence[int], eps: float, affine: Sequence[Any], running: Sequence[Any], momentum: Sequence[Any]
) -> bool:
    """Returns whether `normalised` can do it, and is the faster way; anything wrong or rare is left to others."""
    dtype = reference.accumulator(x)
    if not x.is_cpu or torch.compiler.is_compiling() or x.dtype != dtype or not reference.is_dense(x):
        return False
    if reference.has_rows(x) or not 0 <= eps < math.inf:
        return False
    count = len(sizes)
    rows = [row for rows in affine for row in rows] + [row for rows in running if rows is not None for row in rows]
    if len(momentum) != count or any(rows is not None and len(rows) != count for rows in (*affine, *running)):
        return False
    plain = all(row.shape == x.shape[1:2] and row.dtype == dtype and row.is_cpu and row.is_contiguous() for row in rows)
    return plain and all(isinstance(share, float) for share in momentum)


class MixtureBatchNorm(torch.autograd.Function):
    """Returns the result; updates the running statistics.

    Without ``setup_context``, whose every call looks the signature up, which takes as long as a small layer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        sizes: list[int],
        eps: float,
        relu: bool,
        momentum: Sequence[float],
        running: Any,
        *affine: Tensor,
    ) -> Tensor:
        out, count = torch.empty_like(x), len(sizes)
        mean, inverse = x.new_empty(count, x.shape[1]), x.new_empty(count, x.shape[1])
        means, variances = (rows or [None] * count for rows in running)
        groups = zip(x.split(sizes), affine[:count], affine[count:], means, variances, strict=True)
        results = zip(out.split(sizes), mean, inverse, strict=True)
        for group, share, result in zip(groups, momentum, results, strict=True):
            torch.native_batch_norm(*group, True, share, eps, out=result)
        ctx.sizes, ctx.eps = sizes, eps
        ctx.save_for_backward(x, out if relu else None, mean, inverse, *affine[:count])
        return out.relu_() if relu else out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, out, mean, inverse, *weights = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants the derivative of this one
            by_x, by_weight, by_bias = reference.gradients(g, x, torch.stack(weights), out, ctx.sizes, ctx.eps)
            return by_x, None, None, None, None, None, *by_weight, *by_bias
        if out is not None:
            g = torch.ops.aten.threshold_backward(g, out, 0)
        masked = [None] * len(weights)  # g is
        groups = zip(g.split(ctx.sizes), x.split(ctx.sizes), masked, weights, mean, inverse, strict=True)
        parts, weight_rows, bias_rows = zip(*(reference.group_backward(*group) for group in groups), strict=True)
        return torch.cat(parts), None, None, None, None, None, *weight_rows, *bias_rows

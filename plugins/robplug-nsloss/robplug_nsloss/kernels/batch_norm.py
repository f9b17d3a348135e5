"""Batch norm by known statistics, whose backward pass goes over memory once, where PyTorch's goes twice."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from robplug_nsloss.kernels.calls import is_native_norm, norm_gradients


def batch_norm(
    x: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Returns `torch.nn.functional.batch_norm` of the same arguments, with the same gradients.

    The kernel for the CPU serves in eval mode, in float32, for contiguous samples (N, C, ...). For passes of one's own:
    PyTorch's node of the graph has other neighbours and is one for forward-mode differentiation, too.
    """
    if not training and is_native_norm(x, mean, variance, weight, bias, eps):
        out: Tensor = _native(x, mean, variance, weight, bias, eps)
        return out
    return F.batch_norm(x, mean, variance, weight, bias, training, momentum, eps)


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, mean, variance, weight)
        ctx.eps = eps
        return torch.batch_norm(x, weight, bias, mean, variance, False, 0.0, eps, False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 6
        by_x, by_weight, by_bias = norm_gradients(g, *ctx.saved_tensors, ctx.eps)
        wanted = ctx.needs_input_grad
        return by_x, None, None, by_weight if wanted[3] else None, by_bias if wanted[4] else None, None


_native = super(torch.autograd.Function, _Native).apply  # without a look for transforms, of which ``are_plain`` knows

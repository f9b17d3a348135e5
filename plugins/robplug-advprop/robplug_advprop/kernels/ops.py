"""The kernels as PyTorch operators: schema, checks, shapes, devices and derivatives.

The reference runs on every device but CUDA, where the Triton kernels do. Each check is one function that serves both
the implementation and the fake one, so that eager mode and ``torch.compile`` refuse the same arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from robplug.kernels import operator
from robplug_advprop.kernels import checks, parts, reference

Rows = Tensor | Sequence[Tensor]
Momentum = float | Tensor


def mixture_batch_norm(
    x: Tensor,
    sizes: Sequence[int],
    weight: Rows | None = None,
    bias: Rows | None = None,
    running_mean: Rows | None = None,
    running_var: Rows | None = None,
    momentum: Momentum | Sequence[Momentum] = 0.1,
    eps: float = 1e-5,
    relu: bool = False,
) -> Tensor:
    """Normalises consecutive groups of a batch, each by its own statistics: batch norm in training, K times at once.

    Convention:
        Order: the first sizes[0] samples are group 0, the next sizes[1] group 1, and so on.
        Variance: biased where it normalises, unbiased in the running statistics, as `torch.nn.functional.batch_norm`.
        Running statistics: updated in place, running + momentum * (batch - running), each group its own.

    Args:
        x: (N, C, ...), float16, bfloat16, float32 or float64, any strides; channels_last stays.
        sizes: samples of each of the K groups; they add up to N.
        weight: (K, C), or K tensors (C,); None means 1.
        bias: likewise; None means 0.
        running_mean: (K, C), or K tensors (C,), updated in place; None where none are kept.
        running_var: likewise.
        momentum: one for all groups, or one for each; a tensor of one value is not read on the host.
        eps: added to each variance.
        relu: whether a ReLU follows.

    Returns:
        (N, C, ...) with the dtype and strides of x; computed in float32, or float64 for a float64 x.

    Differentiable: in x, weight and bias; once by hand, any number of times through the reference.

    Raises:
        TypeError: x is not of a floating dtype.
        ValueError: sizes, shapes or devices do not fit, or a group has fewer than two values a channel.

    Source: Xie et al. 2020, Adversarial Examples Improve Image Recognition, section 4 (auxiliary batch norm).
    """
    checks.groups(x, sizes)
    shares = momentum if isinstance(momentum, Sequence) else [momentum] * len(sizes)
    shape, dtype = (len(sizes), x.shape[1]), reference.accumulator(x)
    if x.is_cpu and weight is not None and bias is not None:
        affine, running = (weight, bias), (running_mean, running_var)
        if parts.fits(x, sizes, eps, affine, running, shares):
            rows = [None if one is None else list(one) for one in running]
            return parts.normalised(x, list(sizes), eps, relu, shares, rows, list(weight), list(bias))
    scale = x.new_ones(shape, dtype=dtype) if weight is None else _stacked(weight).to(dtype)
    shift = x.new_zeros(shape, dtype=dtype) if bias is None else _stacked(bias).to(dtype)
    # on the CPU, calling an operator costs as much as normalising a small layer
    call = _Direct.apply if x.is_cpu and not torch.compiler.is_compiling() else _mixture
    out: Tensor
    out, mean, var = call(x, scale, shift, list(sizes), eps, relu)
    for kept, batch in ((running_mean, mean), (running_var, var)):
        if kept is not None:
            _update(kept, batch, shares)
    return out


def _stacked(rows: Rows) -> Tensor:
    return rows if isinstance(rows, Tensor) else torch.stack(tuple(rows))


@torch.no_grad()
def _update(running: Rows, batch: Tensor, momentum: Sequence[Momentum]) -> None:
    """Moves each running statistic towards that of the batch, in place."""
    for row, value, share in zip(running, batch, momentum, strict=True):
        row.lerp_(value.to(row.dtype), share.to(row.dtype) if isinstance(share, Tensor) else share)


def _normalised(x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


def _gradients(g: Tensor, x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _normalised(x, weight)


_mixture = operator(
    "mixture_batch_norm(Tensor x, Tensor weight, Tensor bias, SymInt[] sizes, float eps, bool relu)"
    " -> (Tensor, Tensor, Tensor)",
    reference,
    checks.mixture,
    _normalised,
)
_mixture_backward = operator(
    "mixture_batch_norm_backward(Tensor g, Tensor x, Tensor weight, Tensor mean, Tensor var, Tensor? out,"
    " SymInt[] sizes, float eps) -> (Tensor, Tensor, Tensor)",
    reference,
    checks.mixture_backward,
    _gradients,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, _, ctx.sizes, ctx.eps, relu = inputs
    out, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.save_for_backward(x, weight, mean, var, out if relu else None)


def _backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, weight, mean, var, out = ctx.saved_tensors
    if torch.is_grad_enabled():  # somebody wants the derivative of this one
        found = reference.gradients(g, x, weight, out, ctx.sizes, ctx.eps)
    else:
        direct = g.is_cpu and not torch.compiler.is_compiling()
        call = reference.mixture_batch_norm_backward if direct else _mixture_backward
        found = call(g, x, weight, mean, var, out, ctx.sizes, ctx.eps)
    return *found, None, None, None


_mixture.register_autograd(_backward, setup_context=_setup)


class _Direct(torch.autograd.Function):
    """The operator on the CPU without its dispatch."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor, sizes: list[int], eps: float, relu: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        checks.mixture(x, weight, bias, sizes, eps, relu)
        return reference.mixture_batch_norm(x, weight, bias, sizes, eps, relu)

    setup_context = staticmethod(_setup)
    backward = staticmethod(_backward)

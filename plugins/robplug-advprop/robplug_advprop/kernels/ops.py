"""The kernels as PyTorch operators: schema, checks, shapes, devices and derivatives.

On CUDA the Triton kernels run; on the CPU those of ``numba_impl`` in single precision, uncompiled; else the reference.
Each check is one function that serves both the implementation and the fake one, so that eager mode and
``torch.compile`` refuse the same arguments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from robplug.kernels import are_plain, cpu_kernels, operator
from robplug_advprop.kernels import checks, reference

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
        momentum: one for all groups, or one for each; a tensor of one value is not read on the host of a GPU.
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
    if _is_native(x, len(sizes), eps, shares, (weight, bias, running_mean, running_var)):
        scales = x.new_ones(shape).unbind() if weight is None else weight
        shifts = x.new_zeros(shape).unbind() if bias is None else bias
        settings = [*map(int, sizes)], float(eps), bool(relu), [*map(float, shares)], running_mean, running_var
        out: Tensor = _native(x, settings, *scales, *shifts)
        return out
    scale = x.new_ones(shape, dtype=dtype) if weight is None else _stacked(weight).to(dtype)
    shift = x.new_zeros(shape, dtype=dtype) if bias is None else _stacked(bias).to(dtype)
    # on the CPU, calling an operator costs as much as normalising a small layer
    call = _Direct.apply if x.is_cpu and not torch.compiler.is_compiling() else _mixture
    out, mean, var = call(x, scale, shift, list(sizes), eps, relu)
    for kept, batch in ((running_mean, mean), (running_var, var)):
        if kept is not None:
            _update(kept, batch, shares)
    return out


def _is_native(x: Tensor, groups: int, eps: float, momentum: Sequence[Momentum], rows: Sequence[Rows | None]) -> bool:
    """Returns whether the kernels for the CPU can do it; anything wrong is left to others to refuse."""
    if x.dtype != torch.float32 or not x.numel():
        return False
    if not reference.is_dense(x) or not 0 <= eps < math.inf or len(momentum) != groups:
        return False
    if any(some is not None and len(some) != groups for some in rows):
        return False
    each = [row for some in rows if some is not None for row in some]
    if not are_plain(x, *each):
        return False
    channels = x.shape[1:2]
    for row in each:
        if row.shape != channels or row.dtype != torch.float32 or not row.is_contiguous():
            return False
    written = [row for some in rows[2:] if some is not None for row in some]
    return len({row.data_ptr() for row in written}) == len(written) and not any(map(Tensor.is_inference, written))


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


class _Native(torch.autograd.Function):
    """Mixture batch norm by ``numba_impl``; updates the running statistics.

    Weights and biases are the separate rows that they are, and there is no ``setup_context``, whose every call looks
    the signature up: both would take as long as a small layer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        settings: tuple[list[int], float, bool, list[float], Rows | None, Rows | None],
        *affine: Tensor,
    ) -> Tensor:
        sizes, eps, relu, momentum, *running = settings
        weight, bias = affine[: len(sizes)], affine[len(sizes) :]
        kept = [None if rows is None else list(rows) for rows in running]
        out, found = cpu_kernels(reference).mixture_batch_norm(x, sizes, eps, relu, momentum, kept, weight, bias)
        torch.autograd.graph.increment_version([row for rows in kept if rows is not None for row in rows])
        ctx.sizes, ctx.eps = sizes, eps
        ctx.save_for_backward(x, out if relu else None, found, *weight)
        result: Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, out, found, *weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants the derivative of this one
            by_x, by_weight, by_bias = reference.gradients(g, x, torch.stack(weight), out, ctx.sizes, ctx.eps)
            return by_x, None, *by_weight.unbind(), *by_bias.unbind()
        laid = g if g.stride() == x.stride() and are_plain(g) else torch.empty_like(x).copy_(g)
        by_x, by_rows = cpu_kernels(reference).mixture_batch_norm_backward(laid, x, out, ctx.sizes, weight, found)
        return by_x, None, *by_rows.unbind()


_native = super(torch.autograd.Function, _Native).apply  # without a look for transforms, of which ``are_plain`` knows

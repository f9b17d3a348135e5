"""The kernels as PyTorch operators: schema, checks, shapes, devices and derivatives.

On CUDA the Triton kernels run, elsewhere the reference; on the CPU, uncompiled, ``numba_impl`` draws the masks of
dropout erosion, bit for bit the same. One check serves the implementation and the fake one, so that eager mode and
``torch.compile`` refuse the same arguments.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from robplug.kernels import are_plain, cpu_kernels, operator
from robplug_ghost.kernels import checks, reference

SINGLE = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes that are computed with in single precision."""


def erode_add(
    shortcut: Tensor,
    residual: Tensor,
    seed: int,
    layer: int,
    skip: float,
    activation: Literal["relu"] | None = None,
) -> Tensor:
    """Returns activation(w * shortcut + residual), where each channel has one w from U[1 - skip, 1 + skip].

    Convention:
        Axis order: samples, channels, positions; the samples share their weights.
        Random numbers: those of (seed, layer, channel), the same on every device and in every dtype.

    Args:
        shortcut: (N, C, ...), float16, bfloat16, float32 or float64, any strides.
        residual: likewise; of two dtypes the result has the one that ``+`` gives.
        seed: the ghost, 0 to 2**63 - 1.
        layer: number of the addition in its network, 0 to 2**31 - 1.
        skip: width of the erosion, 0 to 1; with 0 this is the plain sum, bit for bit.
        activation: ``"relu"`` or None.

    Returns:
        (N, C, ...), channels last if ``residual`` is and else contiguous; computed in float32, or float64 for float64.

    Differentiable: in shortcut and residual; once with an activation, any number of times without. On CUDA the weights
        are drawn again for the gradient, and but for the result of a ReLU nothing is kept; on the CPU the weights are.

    Raises:
        TypeError: a tensor is not of a floating dtype.
        ValueError: shapes, devices, seed, layer, skip or activation do not fit.

    Source: Li et al. 2020, Learning Transferable Adversarial Examples via Ghost Networks (skip connection erosion).
    """
    if activation not in (None, "relu"):
        raise ValueError(f"expected activation 'relu' or None, got {activation!r}; apply another one to the result")
    if shortcut.dtype != residual.dtype:
        dtype = torch.result_type(shortcut, residual)
        shortcut, residual = shortcut.to(dtype), residual.to(dtype)
    return _call("erode_add", shortcut, residual, seed, layer, float(skip), activation == "relu")


def erode_scale(x: Tensor, seed: int, layer: int, skip: float) -> Tensor:
    """Returns w * x, the shortcut of `erode_add` alone; arguments, weights and errors are those of `erode_add`.

    Differentiable: any number of times, in x.
    """
    return _call("erode_scale", x, seed, layer, float(skip))


def erode_dropout(x: Tensor, seed: int, layer: int, keep: float) -> Tensor:
    """Returns x / keep where a position of a channel is kept, with that probability, and 0 elsewhere.

    Convention:
        Axis order: samples, channels, positions; the samples share one mask.
        Random numbers: those of (seed, layer, channel, position), the same on every device, in every dtype and layout.
        Positions: counted in the order of a contiguous tensor.

    Args:
        x: (N, C, ...), float16, bfloat16, float32 or float64, any strides.
        seed: the ghost, 0 to 2**63 - 1.
        layer: number of the dropout in its network, 0 to 2**31 - 1.
        keep: probability above 0 and up to 1; with 1 the result is x, bit for bit. It counts in steps of 2**-24.

    Returns:
        (N, C, ...) with the dtype of x, channels last if x is and else contiguous.

    Differentiable: any number of times, in x. On CUDA the mask is drawn again for the gradient, and nothing is kept; on
        the CPU the mask is, which has the size of one sample.

    Raises:
        TypeError: x is not of a floating dtype.
        ValueError: shape, seed, layer or keep do not fit.

    Source: Li et al. 2020, Learning Transferable Adversarial Examples via Ghost Networks (dropout erosion).
    """
    keep = float(keep)
    if x.dtype in SINGLE and x.numel() and are_plain(x):
        checks.erode_dropout(x, seed, layer, keep)
        out: Tensor = cpu_kernels(reference).erode_dropout(x, int(seed), int(layer), keep)
        return out
    return _call("erode_dropout", x, seed, layer, keep)


def _call(name: str, x: Tensor, *args: Any) -> Tensor:
    """Calls an operator, or on the CPU the reference itself: for a small layer, the call costs more than the layer."""
    if not x.is_cpu or torch.compiler.is_compiling():
        out: Tensor = getattr(torch.ops.robplug_ghost, name)(x, *args)
        return out
    getattr(checks, name)(x, *args)
    return getattr(reference, name)(x, *args)  # type: ignore[no-any-return]


def _like_first(x: Tensor, *_: Any) -> Tensor:
    return reference.empty(x)


def _like_second(_first: Tensor, second: Tensor, *_: Any) -> Tensor:
    return reference.empty(second)


def _two_like_second(first: Tensor, second: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return reference.empty(second), reference.empty(second)


_erode_add = operator(
    "erode_add(Tensor shortcut, Tensor residual, int seed, int layer, float skip, bool relu) -> Tensor",
    reference,
    checks.erode_add,
    _like_second,
)
_erode_add_backward = operator(
    "erode_add_backward(Tensor g, Tensor out, int seed, int layer, float skip) -> (Tensor, Tensor)",
    reference,
    checks.erode_add_backward,
    _two_like_second,
)
_erode_scale = operator(
    "erode_scale(Tensor x, int seed, int layer, float skip) -> Tensor", reference, checks.erode_scale, _like_first
)
_erode_dropout = operator(
    "erode_dropout(Tensor x, int seed, int layer, float keep) -> Tensor", reference, checks.erode_dropout, _like_first
)


def _setup_add(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *_, ctx.seed, ctx.layer, ctx.skip, relu = inputs
    ctx.save_for_backward(output if relu else None)


def _add_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    (out,) = ctx.saved_tensors
    if out is not None:
        return *_erode_add_backward(g, out, ctx.seed, ctx.layer, ctx.skip), None, None, None, None
    shortcut = _erode_scale(g, ctx.seed, ctx.layer, ctx.skip) if ctx.needs_input_grad[0] else None
    return shortcut, g, None, None, None, None


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *ctx.rest = inputs


_erode_add.register_autograd(_add_backward, setup_context=_setup_add)
_erode_scale.register_autograd(lambda ctx, g: (_erode_scale(g, *ctx.rest), None, None, None), setup_context=_setup)
_erode_dropout.register_autograd(lambda ctx, g: (_erode_dropout(g, *ctx.rest), None, None, None), setup_context=_setup)

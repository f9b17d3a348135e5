"""The kernels as PyTorch operators: schema, checks, shapes, devices and derivatives.

The reference runs on every device but CUDA, where the Triton kernels do. Each check is one function that serves both
the implementation and the fake one, so that eager mode and ``torch.compile`` refuse the same arguments.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from robplug.kernels import operator
from robplug_flow.kernels import checks, reference

Pair = tuple[Tensor, Tensor]


def warp(x: Tensor, flow: Tensor) -> Tensor:
    """Samples images at displaced positions: out(p) = x(p + flow(p)), bilinearly.

    Convention:
        Axis order: flow[:, 0] is the displacement along rows (down), flow[:, 1] along columns (right).
        Unit: pixels; pixel centres lie at integers. A flow of `torch.nn.functional.grid_sample` with
        ``align_corners=True`` is (H - 1)/2 and (W - 1)/2 times smaller, and has the columns first.
        Direction: backward; the flow says where an output pixel comes from.
        Edge: coordinates are clamped to [0, H - 1] and [0, W - 1] (``padding_mode="border"``).
        Kinks: at an integer coordinate the derivative is the forward difference x(p + 1) - x(p), zero in the last
        row or column; never the backward one, as weights come from the flow before the position is added.

    Flow 0 gives x bit for bit and an integer flow a shifted x, wherever x is finite (a zero may lose its sign).
    A NaN in the flow gives NaN; an infinite displacement ends at the edge, like any that leaves the image.

    Args:
        x: images (N, C, H, W), float16, bfloat16, float32 or float64, any strides.
        flow: displacements (N, 2, H, W) in any of these dtypes; float32 is finer than a half of the same size.

    Returns:
        (N, C, H, W) with the dtype and strides of x; computed in float32, or float64 if an argument is.

    Differentiable: twice, in x and flow. On CUDA the gradient in x adds atomically, in no fixed order.

    Raises:
        TypeError: an argument is not of a floating dtype.
        ValueError: shapes or devices do not fit.

    Source: flow-gradient paper, equation 4; edge and kinks are not in the text.
    """
    out: Tensor = _warp(x, flow)
    return out


def flow_gradient_penalty(x: Tensor, g: Tensor, kappa_row: float = 1.0, kappa_col: float = 1.0) -> Tensor:
    """Returns each sample's squared norm of the loss gradient with respect to a flow, at flow 0.

    By the chain rule it is a closed form of the input gradient g:
    sum over p of (kappa_row * sum_c g_c D_row x_c)^2 + (kappa_col * sum_c g_c D_col x_c)^2.

    Convention:
        D_row x(p) = x(p + 1 row) - x(p), D_col likewise: forward differences, zero in the last row or column (edge
        clamp), as `warp` has them at flow 0.
        Unit: kappa 1 is for flows in pixels; kappa_row = (H - 1)/2 and kappa_col = (W - 1)/2 for flows in the
        normalised [-1, 1] coordinates of the paper (``align_corners=True``).

    Args:
        x: images (N, C, H, W), float16, bfloat16, float32 or float64, any strides.
        g: gradient of the SUM of the samples' losses with respect to x, same shape and dtype.
        kappa_row: factor of the derivatives along rows.
        kappa_col: factor of the derivatives along columns.

    Returns:
        (N,) float32, or float64 for float64 images: a sum over pixels does not fit into half precision.

    Differentiable: twice, in x and g.

    Raises:
        TypeError: x is not of a floating dtype.
        ValueError: shapes, dtypes or devices do not fit, or a kappa is negative or not finite.

    Source: flow-gradient paper, equation 11 with q = 2, per sample and without lambda.
    """
    out: Tensor = _penalty(x, g, kappa_row, kappa_col)
    return out


def flow_smoothness(flow: Tensor, neighbours: Literal["adjacent", "diagonal"] = "adjacent") -> Tensor:
    """Returns each sample's flow loss: the sum over pixels and their neighbours of sqrt(du^2 + dv^2 + 1e-8).

    Convention:
        The sum goes over all pixels and for each over all its neighbours, as in the text and in common code, so that
        each pair counts twice: 2(2HW - H - W) terms if adjacent, 4(H - 1)(W - 1) if diagonal.
        Edge: neighbours outside of the image are left out.
        Unit: that of the flow; the 1e-8 makes a constant flow cost 1e-4 a term.

    Args:
        flow: (N, 2, H, W), float16, bfloat16, float32 or float64, any strides.
        neighbours: ``"adjacent"``: above, below, left and right, as in the paper's text; ``"diagonal"``: the four
            diagonal ones, as in common code.

    Returns:
        (N,) float32, or float64 for a float64 flow.

    Differentiable: twice. The gradient is made in the pass that makes the value.

    Raises:
        TypeError: the flow is not of a floating dtype.
        ValueError: the shape does not fit, or the neighbours are neither of the two.

    Source: spatially transformed adversarial examples (Xiao et al. 2018), equation 4.
    """
    value: Tensor = _smoothness(flow, neighbours)[0]
    return value


def _like_first(first: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(first)


def _like_flow(g: Tensor, x: Tensor, flow: Tensor) -> Tensor:
    return torch.empty_like(flow)


def _per_sample(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], dtype=reference.accumulator(x))


def _like_images(u: Tensor, x: Tensor, g: Tensor, kappa_row: float, kappa_col: float, need_x: bool) -> Pair:
    return torch.empty_like(x) if need_x else x.new_empty(0), torch.empty_like(g)


def _value_and_gradient(flow: Tensor, neighbours: str) -> Pair:
    return _per_sample(flow), torch.empty_like(flow)


_warp = operator("warp(Tensor x, Tensor flow) -> Tensor", reference, checks.warp, _like_first)
_warp_adjoint = operator("warp_adjoint(Tensor g, Tensor flow) -> Tensor", reference, checks.warp, _like_first)
_warp_flow_gradient = operator(
    "warp_flow_gradient(Tensor g, Tensor x, Tensor flow) -> Tensor",
    reference,
    checks.warp_gradient,
    _like_flow,
)
_penalty = operator(
    "flow_gradient_penalty(Tensor x, Tensor g, float kappa_row, float kappa_col) -> Tensor",
    reference,
    checks.penalty,
    _per_sample,
)
_penalty_gradient = operator(
    "flow_gradient_penalty_gradient"
    "(Tensor u, Tensor x, Tensor g, float kappa_row, float kappa_col, bool need_x) -> (Tensor, Tensor)",
    reference,
    checks.penalty_gradient,
    _like_images,
)
_smoothness = operator(
    "flow_smoothness(Tensor flow, str neighbours) -> (Tensor, Tensor)",
    reference,
    checks.smoothness,
    _value_and_gradient,
)


def _save_tensors(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _warp_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, flow = ctx.saved_tensors
    need_x, need_flow = ctx.needs_input_grad
    grad_x = _warp_adjoint(g, flow) if need_x else None
    return grad_x, _warp_flow_gradient(g, x, flow) if need_flow else None


def _warp_adjoint_backward(ctx: Any, h: Tensor) -> tuple[Tensor | None, Tensor | None]:
    g, flow = ctx.saved_tensors
    need_g, need_flow = ctx.needs_input_grad
    grad_g = _warp(h, flow) if need_g else None
    return grad_g, _warp_flow_gradient(g, h, flow) if need_flow else None


def _warp_flow_gradient_backward(ctx: Any, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return reference.warp_flow_gradient_backward(h, *ctx.saved_tensors)


def _penalty_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, g, *ctx.kappas = inputs
    ctx.save_for_backward(x, g)


def _penalty_backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x, g = ctx.saved_tensors
    need_x, need_g, *_ = ctx.needs_input_grad
    grad_x, grad_g = _penalty_gradient(u, x, g, *ctx.kappas, need_x)
    return grad_x if need_x else None, grad_g if need_g else None, None, None


def _penalty_gradient_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    u, x, g, *ctx.kappas, ctx.need_x = inputs
    ctx.save_for_backward(u, x, g)
    ctx.set_materialize_grads(False)


def _penalty_gradient_backward(ctx: Any, h_x: Tensor | None, h_g: Tensor | None) -> tuple[Any, ...]:
    h_x = h_x if ctx.need_x else None
    grads = reference.flow_gradient_penalty_gradient_backward(h_x, h_g, *ctx.saved_tensors, *ctx.kappas)
    return *grads, None, None, None


def _smoothness_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    flow, ctx.neighbours = inputs
    ctx.save_for_backward(flow, output[1])
    ctx.set_materialize_grads(False)


def _smoothness_backward(ctx: Any, u: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, None]:
    flow, gradient = ctx.saved_tensors
    grad = None if u is None else (u.view(-1, 1, 1, 1) * gradient).to(flow.dtype)
    if h is not None:
        curved = reference.flow_smoothness_gradient_backward(h, flow, ctx.neighbours)
        grad = curved if grad is None else grad + curved
    return grad, None


_warp.register_autograd(_warp_backward, setup_context=_save_tensors)
_warp_adjoint.register_autograd(_warp_adjoint_backward, setup_context=_save_tensors)
_warp_flow_gradient.register_autograd(_warp_flow_gradient_backward, setup_context=_save_tensors)
_penalty.register_autograd(_penalty_backward, setup_context=_penalty_setup)
_penalty_gradient.register_autograd(_penalty_gradient_backward, setup_context=_penalty_gradient_setup)
_smoothness.register_autograd(_smoothness_backward, setup_context=_smoothness_setup)

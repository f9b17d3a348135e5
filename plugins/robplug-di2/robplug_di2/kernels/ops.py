"""The kernels as PyTorch operators: schema, checks, shapes, devices and derivatives.

The reference runs on every device but CUDA, where the Triton kernels do. One check serves the implementation and the
fake one, so that eager mode and ``torch.compile`` refuse the same arguments.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from robplug.kernels import operator
from robplug_di2.kernels import checks, reference

Mode = Literal["nearest", "bilinear"]


def resize_pad(
    x: Tensor,
    size: Tensor,
    offset: Tensor,
    canvas: tuple[int, int],
    mode: Mode = "nearest",
    fill: float = 0.0,
) -> Tensor:
    """Resizes each image to a size of its own and puts it on a canvas of one value, in one pass.

    Convention:
        Axis order: (rows, columns) in size, offset and canvas.
        Offset: the row and column of the canvas where the resized image's first pixel comes to lie.
        Nearest: pixel q of S' comes from floor(q * S / S'), as `torch.nn.functional.interpolate` has it but in exact
        arithmetic: PyTorch rounds S / S' to float32 first and may land one pixel short, as from 256 to 282.
        Bilinear: from (q + 1/2) * S / S' - 1/2, clamped to the image (``align_corners=False``, no antialiasing).
        What leaves the canvas is cut off; a size below 1 shows nothing.

    Args:
        x: images (N, C, H, W), float16, bfloat16, float32 or float64, any strides.
        size: (N, 2) int64, up to 16384.
        offset: (N, 2) int64.
        canvas: height and width of the result.
        mode: ``"nearest"`` or ``"bilinear"``.
        fill: value of the canvas where no image is; on CUDA it passes through float32.

    Returns:
        (N, C, *canvas) with the dtype of x, contiguous; computed in float32, or float64 if x is.

    Differentiable: any number of times, in x. No atomic additions: the gradient is the same in every run.

    Raises:
        TypeError: x is not of a floating dtype, or size or offset not int64.
        ValueError: shapes, sides, devices or mode do not fit.

    Source: Xie et al. 2019, section 3.3 (input diversity).
    """
    if mode not in ("nearest", "bilinear"):
        raise ValueError(f"expected mode 'nearest' or 'bilinear', got {mode!r}; the paper's is nearest")
    out: Tensor = _resize_pad(x, size, offset, *canvas, mode == "bilinear", float(fill))
    return out


def _on_canvas(x: Tensor, size: Tensor, offset: Tensor, height: int, width: int, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:2], height, width))


_resize_pad = operator(
    "resize_pad(Tensor x, Tensor size, Tensor offset, int height, int width, bool bilinear, float fill) -> Tensor",
    reference,
    checks.resize_pad,
    _on_canvas,
)
_adjoint = operator(
    "resize_pad_adjoint(Tensor g, Tensor size, Tensor offset, int height, int width, bool bilinear) -> Tensor",
    reference,
    checks.resize_pad,
    _on_canvas,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, size, offset, _height, _width, ctx.bilinear, *_ = inputs
    ctx.save_for_backward(size, offset)
    ctx.sides = x.shape[2:]


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    grad = _adjoint(g, *ctx.saved_tensors, *ctx.sides, ctx.bilinear) if ctx.needs_input_grad[0] else None
    return grad, None, None, None, None, None, None


def _adjoint_backward(ctx: Any, h: Tensor) -> tuple[Tensor | None, ...]:
    grad = _resize_pad(h, *ctx.saved_tensors, *ctx.sides, ctx.bilinear, 0.0) if ctx.needs_input_grad[0] else None
    return grad, None, None, None, None, None


_resize_pad.register_autograd(_backward, setup_context=_setup)
_adjoint.register_autograd(_adjoint_backward, setup_context=_setup)

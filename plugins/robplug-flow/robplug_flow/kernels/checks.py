"""The checks of the operators' arguments: what was expected, the value and the remedy.

One function per operator, with the operator's arguments; it serves the implementation and the fake one alike.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NEIGHBOURS = ("adjacent", "diagonal")


def warp(x: Tensor, flow: Tensor) -> None:
    """Checks the arguments of warp and its adjoint."""
    _images("x", x)
    _beside("flow", flow, (x.shape[0], 2, *x.shape[2:]), x)
    _images("flow", flow)


def warp_gradient(g: Tensor, x: Tensor, flow: Tensor) -> None:
    """Checks the arguments of warp_flow_gradient."""
    warp(x, flow)
    _beside("g", g, x.shape, x)


def penalty(x: Tensor, g: Tensor, kappa_row: float, kappa_col: float) -> None:
    """Checks the arguments of flow_gradient_penalty."""
    _images("x", x)
    _beside("g", g, x.shape, x)
    if g.dtype != x.dtype:
        raise ValueError(f"expected g of {x.dtype}, the dtype of x, got {g.dtype}; convert it: g.to(x.dtype)")
    for name, kappa in (("kappa_row", kappa_row), ("kappa_col", kappa_col)):
        if not (math.isfinite(kappa) and kappa >= 0):
            remedy = "1 for pixels, (H - 1)/2 and (W - 1)/2 for normalised units"
            raise ValueError(f"expected a finite {name} >= 0, got {kappa}; {remedy}")


def penalty_gradient(u: Tensor, x: Tensor, g: Tensor, kappa_row: float, kappa_col: float, need_x: bool) -> None:
    """Checks the arguments of flow_gradient_penalty_gradient."""
    penalty(x, g, kappa_row, kappa_col)
    _beside("u", u, x.shape[:1], x)


def smoothness(flow: Tensor, neighbours: str) -> None:
    """Checks the arguments of flow_smoothness."""
    _images("flow", flow)
    if flow.shape[1] != 2:
        remedy = "channel 0 moves along rows, channel 1 along columns"
        raise ValueError(f"expected flow of shape (N, 2, H, W), got {tuple(flow.shape)}; {remedy}")
    if neighbours not in NEIGHBOURS:
        remedy = "the paper's text has the adjacent ones, common code the diagonal ones"
        raise ValueError(f"expected neighbours 'adjacent' or 'diagonal', got {neighbours!r}; {remedy}")


def _images(name: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        remedy = f"convert it first, such as {name}.float() / 255 for 8-bit images"
        raise TypeError(f"expected {name} of float16, bfloat16, float32 or float64, got {x.dtype}; {remedy}")
    if x.dim() != 4 or x.shape[2] < 1 or x.shape[3] < 1:
        remedy = "flows move pixels: give a batch of images with at least one row and one column"
        raise ValueError(f"expected {name} of shape (N, C, H, W), got {tuple(x.shape)}; {remedy}")


def _beside(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    """Checks an argument that goes with the images x."""
    if tensor.shape != shape:
        remedy = f"x is {tuple(x.shape)}, and broadcasting is left to the caller: {name}.expand(...)"
        raise ValueError(f"expected {name} of shape {tuple(shape)}, got {tuple(tensor.shape)}; {remedy}")
    if tensor.device != x.device:
        remedy = f"move one: {name}.to({str(x.device)!r})"
        raise ValueError(f"expected {name} on {x.device}, where x is, got {tensor.device}; {remedy}")

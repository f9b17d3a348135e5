"""The checks of the operators' arguments: what was expected, the value and the remedy.

One function per operator, with the operator's arguments; it serves the implementation and the fake one alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robplug_dag.kernels.reference import accumulator, class_axis

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def dense_adversary_grad(logits: Tensor, labels: Tensor, goals: Tensor, until_goal: bool) -> None:
    """Checks the arguments of dense_adversary_grad."""
    _floating("logits", logits)
    if logits.dim() not in (3, 4):
        raise ValueError(f"expected logits (N, C, H, W) or (N, R, C), got {tuple(logits.shape)}; add a batch axis")
    shape = list(logits.shape)
    classes = shape.pop(class_axis(logits))
    if classes < 2:
        raise ValueError(f"expected logits of at least two classes, got {classes}; no other class can be reached")
    for name, tensor in (("labels", labels), ("goals", goals)):
        if tensor.dtype != torch.int64:
            raise TypeError(f"expected {name} of torch.int64, got {tensor.dtype}; convert them: {name}.long()")
        if list(tensor.shape) != shape:
            remedy = "where logits have a lower resolution, upsample them as the model's own wrapper does"
            raise ValueError(
                f"expected {name} {tuple(shape)} for logits {tuple(logits.shape)}, got {tuple(tensor.shape)}; {remedy}"
            )
        if tensor.device != logits.device:
            raise ValueError(f"expected {name} on {logits.device}, as logits are, got {tensor.device}; move them")


def normalised_step(gradient: Tensor, r: Tensor, x: Tensor, gamma: float, low: float, high: float) -> None:
    """Checks the arguments of normalised_step."""
    _floating("x", x)
    if x.dim() < 2:
        raise ValueError(f"expected x of shape (N, ...), got {tuple(x.shape)}; give a batch")
    _alike("gradient", gradient, x, x.dtype)
    _alike("r", r, x, accumulator(x))
    if not 0 < gamma < float("inf"):
        raise ValueError(f"expected gamma > 0, got {gamma}; the paper's is 0.5 of 255 grey levels")
    if not low < high:
        raise ValueError(f"expected low < high, got {low} and {high}; give the bounds of the images")


def _floating(name: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        known = "float16, bfloat16, float32 or float64"
        raise TypeError(f"expected {name} of {known}, got {x.dtype}; convert it: {name}.float()")


def _alike(name: str, tensor: Tensor, x: Tensor, dtype: torch.dtype) -> None:
    if (tensor.shape, tensor.dtype, tensor.device) != (x.shape, dtype, x.device):
        wanted = f"{tuple(x.shape)} of {dtype} on {x.device}, as x wants it"
        got = f"{tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"
        raise ValueError(f"expected {name} {wanted}, got {got}; a step neither broadcasts nor moves")

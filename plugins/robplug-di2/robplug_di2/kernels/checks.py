"""The checks of the operators' arguments: what was expected, the value and the remedy.

One function per operator, with the operator's arguments; it serves the implementation and the fake one alike. The
values of sizes and offsets are not looked at: that would make a GPU wait, and any of them means something.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST_SIDE = 2**14
"""Coordinates are exact fractions of int32; their products stay below 2**31."""


def resize_pad(
    x: Tensor, size: Tensor, offset: Tensor, height: int, width: int, bilinear: bool, fill: float = 0.0
) -> None:
    """Checks the arguments of resize_pad and, but for the fill, of its adjoint."""
    if x.dtype not in DTYPES:
        remedy = "convert it first, such as x.float() / 255 for 8-bit images"
        raise TypeError(f"expected x of float16, bfloat16, float32 or float64, got {x.dtype}; {remedy}")
    if x.dim() != 4:
        raise ValueError(f"expected x of shape (N, C, H, W), got {tuple(x.shape)}; give a batch of images")
    for side in (*x.shape[2:], height, width):
        if not 1 <= side <= LARGEST_SIDE:
            remedy = "cut larger images into tiles"
            raise ValueError(f"expected images and canvas with sides from 1 to {LARGEST_SIDE}, got {side}; {remedy}")
    for name, pair in (("size", size), ("offset", offset)):
        if pair.dtype != torch.int64:
            raise TypeError(f"expected {name} of torch.int64, got {pair.dtype}; convert it: {name}.long()")
        if pair.shape != (x.shape[0], 2):
            remedy = f"rows and columns for each image; one for all is {name}.expand(len(x), 2)"
            raise ValueError(f"expected {name} of shape ({x.shape[0]}, 2), got {tuple(pair.shape)}; {remedy}")
        if pair.device != x.device:
            remedy = f"move one: {name}.to({str(x.device)!r})"
            raise ValueError(f"expected {name} on {x.device}, where x is, got {pair.device}; {remedy}")

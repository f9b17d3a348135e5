"""Units of flows: pixels, and the paper's normalised coordinates.

Convention:
    Axis order: channel 0 of a flow is the displacement along rows (down), channel 1 along columns (right).
    Pixels: pixel centres lie at integers.
    Normalised: the centres of the first and last pixel of an axis lie at -1 and 1 (``align_corners=True``), so that one
    unit is half the distance between them: (H - 1)/2 pixels along rows, (W - 1)/2 along columns. The paper's budget
    0.01 is 0.155 pixel on 32x32 images.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from robplug.errors import InputError

Unit = Literal["pixel", "normalized"]
UNITS = ("pixel", "normalized")


def to_pixels(flow: Tensor) -> Tensor:
    """Returns a normalised flow, (N, 2, H, W), in pixels."""
    return flow * _sides_like(flow)


def to_normalized(flow: Tensor) -> Tensor:
    """Returns a flow in pixels, (N, 2, H, W), in normalised units; an axis of one pixel, along which nothing can move,
    becomes infinite where it is not 0.
    """
    return torch.where(flow == 0, flow, flow / _sides_like(flow))


def pixels_per_unit(unit: Unit, height: int, width: int) -> tuple[float, float]:
    """Returns how many pixels one unit is, along rows and along columns.

    Raises:
        InputError: there is no such unit.
    """
    if unit not in UNITS:
        raise InputError(f"unit to be {' or '.join(UNITS)}", repr(unit))
    return (1.0, 1.0) if unit == "pixel" else ((height - 1) / 2, (width - 1) / 2)


def check_images(x: Tensor) -> None:
    """Refuses what has no rows and columns that a flow could move along.

    Raises:
        InputError: x is not (N, C, H, W), or has no pixel.
    """
    if x.dim() != 4 or 0 in x.shape[1:]:
        remedy = "a flow moves pixels: give images with at least one channel, row and column"
        raise InputError("images of shape (N, C, H, W)", tuple(x.shape), remedy)


def _sides_like(flow: Tensor) -> Tensor:
    sides = pixels_per_unit("normalized", *flow.shape[2:])
    return torch.tensor(sides, dtype=flow.dtype, device=flow.device).view(2, 1, 1)

"""Mapping samples, radii and results between a data set's bounds and [0, 1], for code that knows only [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = (0.0, 1.0)

ROUNDING = 2.0**-20
"""Share of the width of the box that counts as rounding; ART itself takes 1e-6 for no change in its l0 attack."""


def to_unit(x: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Returns samples scaled to [0, 1]; always a tensor of its own."""
    low, high = bounds
    return x.detach().clone() if bounds == UNIT else ((x.detach() - low) / (high - low)).clamp_(0.0, 1.0)


def from_unit(x: Tensor, found: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Returns what was found on the scale [0, 1] for the samples x, on their own scale."""
    if bounds == UNIT:
        return found
    low, high = bounds
    # the change is mapped and not the image: a value that was left alone stays the same to the bit
    x_adv = x + (found - to_unit(x, bounds)) * (high - low)
    # only the rounding of the map is taken back: what lay outside the box before it stays outside
    return torch.where((found >= 0) & (found <= 1), x_adv.clamp(low, high), x_adv)


def unit_eps(eps: float, bounds: tuple[float, float]) -> float:
    """Returns the radius on the scale [0, 1].

    A library may overstep it by the rounding of its last addition, at most 2 ** -25, which the map back would enlarge.
    """
    return eps if bounds == UNIT else max(eps / (bounds[1] - bounds[0]) - 2.0**-25, 0.0)


def without_rounding(x_adv: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Puts back on the bounds what float32 rounding alone put beyond them; what lies further out stays."""
    low, high = bounds
    inside = x_adv.clamp(low, high)
    return torch.where((x_adv - inside).abs() <= ROUNDING * (high - low), inside, x_adv)

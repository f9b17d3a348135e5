"""The threat norm of rigid motions: how far an image was shifted and turned, as ART and Foolbox shift and turn it.

Convention:
    The witness of x_adv is its motion, (N, 3) float64: the two shifts in pixels and the angle in degrees, in the order
    and with the signs of the library that has moved the image. Foolbox's shifts are along columns, then rows; it
    samples bilinearly, with zeros beyond the edge. ART's are along rows, then columns; it samples with cubic splines,
    first for the shift and then for the rotation, with zeros beyond the edge, and clips to the bounds.
    Sizes are the libraries' own: a shift of 1 is (W - 1) / W pixels in Foolbox, and ART's smallest rotation sets half
    of every edge to 0, since its samples come from outside.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from robplug.errors import ThreatError
from robplug.norms import Ball

DEGREES = 10.0
"""Degrees that count as one pixel."""
FARTHEST = 1e6
"""Larger motions are not tried: they leave nothing of an image, and numbers without an end stop resamplers."""
ROUNDINGS = 20
"""Units of float32 rounding, 2 ** -23, per pixel of the longer side, by which a value may be off.

They are relative to the largest |value|, M, of the image. Foolbox adds three products for a coordinate on the scale
[-1, 1]; where the result can be seen they are off by less than 4.5 units. Added in another order, as for another size
of the batch, they differ by less than 9, which is half the side times as many in pixels. From pixel to pixel a value
changes by 2M at most, along each of two axes: 18. The interpolation adds a few. ART computes in float64 and rounds
after the shift and after the rotation, whose spline filter enlarges the first rounding by less than 9.
"""


def move_by_foolbox(x: Tensor, motion: list[float]) -> Tensor:
    """Returns x, (N, C, H, W) float32, moved as Foolbox's `SpatialAttack` does it.

    Args:
        x: images.
        motion: shift along columns, shift along rows, degrees.
    """
    import eagerpy
    from foolbox.attacks.spatial_attack_transformations import rotate_and_shift

    across, down, degrees = motion
    moved: Tensor = rotate_and_shift(eagerpy.astensor(x), translation=(across, down), rotation=degrees).raw
    return moved


def move_by_art(x: Tensor, motion: list[float]) -> Tensor:
    """Returns x, (N, C, H, W) float32, moved as ART's `SpatialTransformation` does it, before it clips to the bounds.

    Args:
        x: images.
        motion: shift along rows, shift along columns, degrees.
    """
    from scipy.ndimage import rotate, shift

    down, across, degrees = motion
    shifted = shift(x.movedim(1, -1).cpu().numpy(), [0, down, across, 0])
    return torch.from_numpy(rotate(shifted, angle=degrees, axes=(1, 2), reshape=False)).movedim(-1, 1).to(x.device)


@dataclass(frozen=True)
class MotionNorm:
    """The largest of both shifts, in pixels, and the angle, ten degrees of which count as one.

    That is the budget of Engstrom et al. 2019: 3 pixels and 30 degrees are eps = 3. Several motions may give one x_adv;
    what counts is the motion that is shown, once it is seen to give x_adv.

    Attributes:
        name: as in a threat.
    """

    name: str = "rotation-translation"

    def distance(self, x: Tensor, x_adv: Tensor, witness: Tensor | None = None) -> Tensor:
        """Returns the size of the motion that is the witness, or infinity where it does not turn x into x_adv.

        The motion is made again with each library's own resampler, if it is installed; a value may be off by rounding.
        The bounds, to which ART clips, are not known here: any clipping outside the values of x is taken for theirs.

        Args:
            x: (N, C, H, W) clean images.
            x_adv: likewise.
            witness: (N, 3) motions. None is needed where x_adv is x, whose distance is 0.

        Returns:
            (N,) float64.
        """
        same = (x == x_adv).flatten(1).all(1)
        size = torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device).masked_fill_(same, 0.0)
        if x.dim() != 4 or witness is None or witness.shape != (len(x), 3):
            return size
        motions = witness.detach().to("cpu", torch.float64)
        known = (motions.abs() <= FARTHEST).all(1) & ~same.cpu()  # a NaN is not known
        for i in known.nonzero().flatten().tolist():
            first, second, degrees = motions[i].tolist()
            if _explains([first, second, degrees], x.detach()[i : i + 1], x_adv.detach()[i : i + 1]):
                size[i] = max(abs(first), abs(second), abs(degrees) / DEGREES)
        return size

    def allowed(self, eps: float, values: int, bounds: tuple[float, float]) -> float:
        """Returns eps and the rounding of the radius in degrees, to and fro."""
        return eps * (1 + 1e-6)

    def ball(self, x: Tensor, eps: float | None, bounds: tuple[float, float]) -> Ball:
        """There is none: two libraries look for motions, each with a search of its own.

        Raises:
            ThreatError: always.
        """
        remedy = "use foolbox/spatial or art/spatial-transformation"
        raise ThreatError(f"expected a norm in whose ball an attack can move, got {self.name}; {remedy}")


def _explains(motion: list[float], x: Tensor, x_adv: Tensor) -> bool:
    """Returns whether either library's motion of one image, (1, C, H, W), gives x_adv."""
    clean, found, allowed = x.float(), x_adv.double(), _tolerance(x)
    square = x.shape[2] == x.shape[3]  # else what Foolbox does is no rotation, and no shift by as many pixels
    with suppress(ImportError):  # a library that is not installed has moved nothing
        if square and _close(move_by_foolbox(clean, motion), found, allowed):
            return True
    with suppress(ImportError):
        if not (motion[0].is_integer() and motion[1].is_integer()):
            return False  # ART knows whole pixels only; by less, its resampler would set a whole row to 0
        # where ART has clipped, the bound is the smallest or largest value of x_adv, and no value of x lies beyond it
        low, high = torch.minimum(clean.min(), found.min()), torch.maximum(clean.max(), found.max())
        return _close(move_by_art(clean, motion).double().clamp(low, high), found, allowed)
    return False


def _close(moved: Tensor, found: Tensor, allowed: float) -> bool:
    return bool(((moved.double() - found).abs() <= allowed).all())  # a NaN is close to nothing


def _tolerance(x: Tensor) -> float:
    """Returns how far a value may be off: by what float32 rounds, and by the rounding of a half-precision result."""
    share = ROUNDINGS * max(x.shape[2:]) * torch.finfo(torch.float32).eps
    if torch.promote_types(x.dtype, torch.float32) != x.dtype:
        share += torch.finfo(x.dtype).eps / 2
    return share * float(x.abs().max())


MOTION = MotionNorm()

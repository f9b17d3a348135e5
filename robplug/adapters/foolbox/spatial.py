"""Foolbox's search for a rotation and two shifts, which takes no radius and does not say what motion it has found.

The radius eps becomes its largest shift, in pixels, and ten times as many degrees its largest angle. The motion of each
sample is found again afterwards: all that the search tries is known, and what it returns is one of these or the sample
itself. A random search draws from the seed, and the same numbers are drawn again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from robplug.adapters.foolbox.inward import GOALS, FoolboxAttack, make_model
from robplug.adapters.motion import DEGREES, move_by_foolbox
from robplug.adapters.unit_box import without_rounding
from robplug.attacks import radius
from robplug.errors import InputError
from robplug.isolation import seeded_globals
from robplug.targets import Target
from robplug.types import Perturbed, ThreatModel

if TYPE_CHECKING:
    from robplug.rng import Rng

Motion = tuple[float, float, float]
"""As in `robplug.adapters.motion`: shift along columns, shift along rows, degrees."""


class Spatial(FoolboxAttack):
    """The base of the class made for Foolbox's `SpatialAttack`."""

    def _attack(self, target: Target, x: Tensor, labels: Tensor, threat: ThreatModel, rng: Rng) -> Perturbed:
        if x.dim() != 4 or x.shape[2] != x.shape[3]:
            remedy = "use art/spatial-transformation; on others Foolbox divides a shift by the length of the wrong side"
            raise InputError(f"square images (N, C, H, H) for {self.entry['name']}", tuple(x.shape), remedy)
        eps, clean = radius(threat), x.detach().float()  # the only dtype that its resampler takes
        model = make_model(_Cast(target).eval(), clean, threat.bounds)
        attack = self.foreign(max_translation=eps, max_rotation=DEGREES * eps, **self.params())
        with seeded_globals(rng.batch_seed()):
            found, _, claim = attack(model, clean, GOALS[threat.targeted](labels))
        with seeded_globals(rng.batch_seed()):
            motion = _motion(clean, found, self._tried(eps))
        unmoved = (found == clean).flatten(1).all(1).view(-1, 1, 1, 1)
        return Perturbed(torch.where(unmoved, x, without_rounding(found, threat.bounds).to(x.dtype)), motion, claim)

    def _tried(self, eps: float) -> Iterable[Motion]:
        """Returns what the library tries, in its order and from the same random numbers."""
        params, degrees = self.params(), DEGREES * eps
        if params["grid_search"]:
            shifts = np.linspace(-eps, eps, params["num_translations"]).tolist()
            angles = np.linspace(-degrees, degrees, params["num_rotations"]).tolist()
            return [(first, second, angle) for angle in angles for first in shifts for second in shifts]
        ends = (degrees, eps, eps)
        angles, first, second = (np.random.uniform(-end, end, params["random_steps"]).tolist() for end in ends)
        return zip(first, second, angles, strict=True)


def _motion(x: Tensor, found: Tensor, tried: Iterable[Motion]) -> Tensor:
    """Returns (N, 3) float64: of each sample the first motion that comes nearest to what was found, or none at all."""
    motion = x.new_zeros(len(x), 3, dtype=torch.float64)
    off = (found - x).flatten(1).abs().amax(1)
    for candidate in tried:
        if not bool(off.any()):
            break
        here = (found - move_by_foolbox(x, list(candidate))).flatten(1).abs().amax(1)
        motion[here < off] = motion.new_tensor(candidate)
        off = torch.minimum(off, here)
    return motion


class _Cast(nn.Module):
    """The network for float32 samples, whatever its own dtype."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.module = target.module
        self._target = target

    def forward(self, x: Tensor) -> Tensor:
        return self._target.logits(x)

"""ART's search for a rotation and two shifts.

It takes its largest shift in percent of the first two axes behind the batch. With channels first these are channels and
rows: 10 % move a 3x32x32 image by 3 pixels along the columns and by none along the rows. It is therefore given its
images with channels last, which it knows as well, and the percentage of the longer side that makes the radius eps in
whole pixels. The largest angle is ten times eps in degrees.

ART picks one motion for a whole batch, the first that changes the most predictions, and so gets a single sample at a
time. It goes by its own predictions and looks at no label.

As shipped its grid has one point, eps to the top left, turned by -10 eps degrees: ``num_translations`` and
``num_rotations`` are to be raised. An odd number of points includes no shift, and no rotation.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from robplug.adapters.art.inward import ArtAttack
from robplug.adapters.motion import DEGREES
from robplug.attacks import radius
from robplug.isolation import seeded_globals
from robplug.targets import Target
from robplug.types import Perturbed, ThreatModel

if TYPE_CHECKING:
    from art.estimators.classification import PyTorchClassifier

    from robplug.rng import Rng


class Spatial(ArtAttack):
    """The base of the class made for ART's `SpatialTransformation`."""

    def _attack(self, target: Target, x: Tensor, labels: Tensor, threat: ThreatModel, rng: Rng) -> Perturbed:
        clean = x.detach().float().movedim(1, -1)
        last = dataclasses.replace(target, module=_ChannelsLast(target.module))
        attack = self._make(self._estimator(last, clean, channels_first=False), len(x), threat)
        with seeded_globals(rng.batch_seed()):
            found = torch.from_numpy(attack.generate(clean.cpu().numpy())).to(clean)
        motion = (attack.attack_trans_x, attack.attack_trans_y, attack.attack_rot)
        x_adv = x.clone() if motion == (0, 0, 0.0) else found.movedim(-1, 1).to(x.dtype)
        return Perturbed(x_adv, torch.tensor([motion], dtype=torch.float64, device=x.device))

    def _make(self, estimator: PyTorchClassifier, count: int, threat: ThreatModel) -> Any:
        eps = radius(threat)
        share = 100.0 * int(eps) / max(estimator.input_shape[:2])
        return self.foreign(
            estimator,
            max_translation=min(share, 100.0),
            max_rotation=min(DEGREES * eps, 180.0),
            verbose=False,
            **self.params(),
        )


class _ChannelsLast(nn.Module):
    """The network for samples whose channels come last."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.movedim(-1, 1))  # type: ignore[no-any-return]

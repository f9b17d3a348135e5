"""The attacks of torchattacks, run on a robplug target.

torchattacks knows only images in [0, 1] of shape (N, C, H, W). Samples with other bounds or axes are mapped there and
back, and the network is put behind the inverse map; the radius follows. The library's own parameters keep the library's
meaning: ``alpha`` is a step on the scale [0, 1] whatever the bounds, so that an attack as shipped is the same attack
for every data set. Canonical parameters, in units of the data, are converted by harmonise.py.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from robplug.adapters.common import ForeignAttack, make_attack_class
from robplug.adapters.unit_box import from_unit, to_unit
from robplug.attacks import radius
from robplug.errors import InputError
from robplug.inputs import check_batch
from robplug.isolation import ModuleState, seeded_globals
from robplug.targets import Target, evaluation_mode
from robplug.types import Perturbed, ThreatModel

if TYPE_CHECKING:
    from robplug.rng import Rng

NORMS = {"linf": "Linf", "l2": "L2"}
THREE_CHANNELS = frozenset({"TIFGSM", "PIFGSM", "PIFGSMPP"})
"""Classes with a convolution over exactly three colours."""


class TorchattacksAttack(ForeignAttack):
    """Base of the classes made from the catalogue."""

    def run(
        self,
        target: Target,
        x: Tensor,
        y: Tensor | None,
        threat: ThreatModel,
        rng: Rng,
        *,
        y_goal: Tensor | None = None,
    ) -> Perturbed:
        """Attacks a batch; see `robplug.types.Attack.run`. There is no claim: the library makes none."""
        self._check(x, threat)
        if len(x) == 0:
            return Perturbed(x.clone())
        before = ModuleState(target.module)
        seed = rng.batch_seed()
        try:
            with evaluation_mode(target.module), seeded_globals(seed):
                labels = check_batch(target, x, y, threat, y_goal)
                attack = self._make(target, x, threat, seed)
                found = attack(to_unit(x, threat.bounds).reshape(_image_shape(x)), labels)
        finally:
            before.restore()
        found = found.detach().to(x.dtype).reshape(x.shape)
        return Perturbed(from_unit(x, found, threat.bounds))

    def _check(self, x: Tensor, threat: ThreatModel) -> None:
        self.check_serves(threat)
        if type(self).__name__ in THREE_CHANNELS and (x.dim() != 4 or x.shape[1] != 3):
            expected = f"images with three colours (N, 3, H, W) for {self.entry['name']}"
            raise InputError(expected, tuple(x.shape), "use another attack")

    def _make(self, target: Target, x: Tensor, threat: ThreatModel, seed: int) -> Any:
        known = inspect.signature(self.foreign).parameters
        decided: dict[str, Any] = {"norm": NORMS.get(threat.norm), "seed": seed % (1 << 31), "verbose": False}
        if self.entry["budget"] == "fixed":
            decided["eps"] = decided["max_epsilon"] = radius(threat) / (threat.bounds[1] - threat.bounds[0])
        if "n_classes" in known:
            decided["n_classes"] = target.count_classes(x)
        attack = self.foreign(
            _Shell(target, x), **self.params(), **{key: value for key, value in decided.items() if key in known}
        )
        if threat.targeted:
            attack.set_mode_targeted_by_label(quiet=True)
        return attack


class _Shell(nn.Module):
    """The network behind the inverse map, for images in [0, 1]."""

    def __init__(self, target: Target, x: Tensor) -> None:
        super().__init__()
        # torchattacks takes the device from the first parameter, which not every network has
        self.anchor = nn.Parameter(x.new_zeros(0), requires_grad=False)
        self.module = target.module
        self._low, high = target.bounds
        self._scale = high - self._low
        self._dtype = target.dtype
        self._shape = x.shape[1:]

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1:].numel() == self._shape.numel():
            x = x.reshape(-1, *self._shape)
        if (self._low, self._scale) != (0.0, 1.0):
            x = x * self._scale + self._low
        return self.module(x.to(self._dtype))  # type: ignore[no-any-return]


def _image_shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape) if x.dim() == 4 else (len(x), 1, 1, x[0].numel())


@functools.cache
def __getattr__(name: str) -> type[Any]:
    return make_attack_class("torchattacks", name, TorchattacksAttack)

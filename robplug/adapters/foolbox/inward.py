"""The attacks of Foolbox, run on a robplug target.

What is returned is what Foolbox gives as the answer at a radius: for a fixed budget the sample clipped to the ball
(its ``clipped``), for a minimal one the sample as found, or the clean one where Foolbox says that it found none
(Carlini and Wagner's attack and EAD leave an image of zeros there). The claim is Foolbox's ``is_adv``.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

import foolbox
import torch
from foolbox.criteria import Criterion, Misclassification, TargetedMisclassification
from torch import Tensor, nn

from robplug.adapters.common import ForeignAttack, make_attack_class
from robplug.adapters.unit_box import from_unit, to_unit
from robplug.attacks import radius
from robplug.inputs import check_batch
from robplug.isolation import ModuleState, seeded_globals
from robplug.targets import Target, evaluation_mode
from robplug.types import Perturbed, ThreatModel

if TYPE_CHECKING:
    from robplug.rng import Rng

DISTANCES = {
    "linf": foolbox.distances.linf,
    "l2": foolbox.distances.l2,
    "l1": foolbox.distances.l1,
    "l0": foolbox.distances.l0,
}
_BLENDED = functools.partial(foolbox.attacks.LinearSearchBlendedUniformNoiseAttack, steps=50)
STARTS = {
    "BoundaryAttack": _BLENDED,
    "HopSkipJumpAttack": _BLENDED,
    "PointwiseAttack": foolbox.attacks.SaltAndPepperNoiseAttack,
}
"""The library's own way to a starting point; left to itself it gives up the batch when it finds none for one sample."""
UNIT_BOX = frozenset({"HopSkipJumpAttack", "GenAttack"})
"""Classes that clip to [0, 1] whatever the model's bounds."""
ONE_BY_ONE = frozenset({"HopSkipJumpAttack"})
"""Classes in which a sample's step depends on its neighbours (a norm is taken over the whole batch)."""


GOALS: dict[bool, type[Criterion]] = {False: Misclassification, True: TargetedMisclassification}


class FoolboxAttack(ForeignAttack):
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
        """Attacks a batch; see `robplug.types.Attack.run`."""
        self.check_serves(threat)
        if len(x) == 0:
            return Perturbed(x.clone())
        rows = torch.eye(len(x), dtype=torch.bool) if self._name in ONE_BY_ONE else torch.ones(1, len(x)).bool()
        before = ModuleState(target.module)
        try:
            with evaluation_mode(target.module):
                labels = check_batch(target, x, y, threat, y_goal)
                parts = [self._attack(target, x[row], labels[row], threat, rng.select(row)) for row in rows]
        finally:
            before.restore()
        return _joined(parts)

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _attack(self, target: Target, x: Tensor, labels: Tensor, threat: ThreatModel, rng: Rng) -> Perturbed:
        model = make_model(target.module, x, threat.bounds)
        eps = radius(threat) if self.entry["budget"] == "fixed" else None
        clean = x
        if self._name in UNIT_BOX:
            model = model.transform_bounds((0, 1))
            clean, eps = to_unit(x, threat.bounds), eps and eps / (threat.bounds[1] - threat.bounds[0])
        with seeded_globals(rng.batch_seed()):
            raw, found, claim = self._call(model, clean, labels, threat.targeted, eps, threat.norm)
        found = _no_rounding_out(raw, found, model.bounds)
        if eps is None:
            found = torch.where(claim.view(-1, *[1] * (x.dim() - 1)), found, clean)
        return Perturbed(from_unit(x, found, threat.bounds) if self._name in UNIT_BOX else found, None, claim)

    def _call(
        self, model: Any, x: Tensor, labels: Tensor, targeted: bool, eps: float | None, norm: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns Foolbox's raw, clipped and is_adv."""
        goal = GOALS[targeted]
        attack = self._make(norm)
        if self._name not in STARTS:
            raw, found, claim = attack(model, x, goal(labels), epsilons=eps)
            return raw, found, claim
        start = STARTS[self._name]().run(model, x, goal(labels))
        ready = _meets(goal(labels), model, start)
        result = x.clone()
        if bool(ready.any()):
            arguments = {"epsilons": eps, "starting_points": start[ready]}
            result[ready] = attack(model, x[ready], goal(labels[ready]), **arguments)[0]
        return result, result, _meets(goal(labels), model, result)

    def _make(self, norm: str) -> Any:
        known = inspect.signature(self.foreign).parameters
        decided = {"distance": DISTANCES[norm], "constraint": norm}
        return self.foreign(**self.params(), **{key: value for key, value in decided.items() if key in known})


def make_model(module: nn.Module, x: Tensor, bounds: tuple[float, float]) -> Any:
    """Returns the network as Foolbox takes it."""
    # Foolbox compares values with bounds as Python numbers; 2.64 is less than its nearest float32
    return foolbox.PyTorchModel(module, bounds=tuple(float(x.new_tensor(bound)) for bound in bounds), device=x.device)


def _joined(parts: list[Perturbed]) -> Perturbed:
    witness = [part.witness for part in parts if part.witness is not None]
    claim = torch.cat([part.claim for part in parts if part.claim is not None])
    return Perturbed(torch.cat([part.x_adv for part in parts]), torch.cat(witness) if witness else None, claim)


def _meets(criterion: Criterion, model: Any, x: Tensor) -> Tensor:
    result: Tensor = criterion(x, model(x))
    return result


def _no_rounding_out(raw: Tensor, found: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Takes back what the clipping to the ball rounds out of the box; what the attack itself put outside stays."""
    low, high = bounds
    return torch.where((raw >= low) & (raw <= high), found.clamp(low, high), found)


@functools.cache
def __getattr__(name: str) -> type[Any]:
    if name == "SpatialAttack":
        from robplug.adapters.foolbox.spatial import Spatial  # which is derived from the class above

        return make_attack_class("foolbox", name, Spatial)
    return make_attack_class("foolbox", name, FoolboxAttack)

"""robplug's attacks as attacks of Foolbox.

Foolbox clips what an attack returns to the ball of a pixel norm. Under any other norm, such as that of a flow, clipping
pixels would destroy it; there the sample as it is stands for both ``raw`` and ``clipped``, and what lies beyond the
radius is not adversarial.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import eagerpy as ep
import foolbox
import torch
from foolbox.attacks.base import Attack as FoolboxAttack
from foolbox.attacks.base import (
    FixedEpsilonAttack,
    MinimizationAttack,
    get_criterion,
    raise_if_kwargs,
    verify_input_bounds,
)
from foolbox.criteria import Misclassification, TargetedMisclassification
from torch import Tensor

from robplug.adapters.common import check_exportable
from robplug.errors import InputError, ThreatError
from robplug.plugins import registry
from robplug.rng import Rng
from robplug.types import Attack, AttackSpec, Perturbed, ThreatModel

DISTANCES = {"linf": foolbox.distances.linf, "l2": foolbox.distances.l2, "l1": foolbox.distances.l1}
"""What Foolbox can measure and clip (it cannot clip l0)."""


def attack(name: str, norm: str | None, seed: int, params: dict[str, Any]) -> FoolboxAttack:
    """Makes the export; see `robplug.adapters.foolbox.attack`."""
    spec: AttackSpec = registry().spec("attack", name)
    check_exportable(spec, "Foolbox")
    norm = spec.norms[0] if norm is None else norm
    if norm not in spec.norms:
        raise ThreatError(f"expected a norm that {name} serves ({', '.join(spec.norms)}), got {norm!r}")
    exported = _Exported(registry().attack(name, **params), spec, norm, Rng(seed, ()))
    if norm not in DISTANCES:
        return UnclippedAttack(exported)
    return ExportedMinimizationAttack(exported) if spec.budget == "minimal" else ExportedFixedEpsilonAttack(exported)


@dataclass(frozen=True)
class _Exported:
    """A robplug attack, called with Foolbox's model, inputs and criterion."""

    attack: Attack
    spec: AttackSpec
    norm: str
    rng: Rng

    def __call__(self, model: Any, x: Tensor, criterion: Any, eps: float | None) -> Perturbed:
        y, y_goal = _labels(criterion)
        targeted = y_goal is not None
        if not (self.spec.targeted if targeted else self.spec.untargeted):
            raise ThreatError(f"expected a criterion that {self.spec.name} serves, got {criterion}")
        target = registry().target(model)
        threat = ThreatModel(self.norm, eps, target.bounds, targeted)
        return self.attack.run(target, x, y, threat, self.rng.next_call(len(x)), y_goal=y_goal)


def _labels(criterion: Any) -> tuple[Tensor | None, Tensor | None]:
    """Returns labels and goals, one of them None."""
    if isinstance(criterion, Misclassification):
        return criterion.labels.raw, None
    if isinstance(criterion, TargetedMisclassification):
        return None, criterion.target_classes.raw
    raise InputError("the criterion Misclassification or TargetedMisclassification", criterion)


class ExportedFixedEpsilonAttack(FixedEpsilonAttack):  # type: ignore[misc]
    """A robplug attack with a fixed budget."""

    def __init__(self, exported: _Exported) -> None:
        self._exported = exported

    @property
    def distance(self) -> Any:
        """Foolbox's distance of the norm."""
        return DISTANCES[self._exported.norm]

    def run(self, model: Any, inputs: Any, criterion: Any, *, epsilon: float, **kwargs: Any) -> Any:
        """Attacks at one epsilon; called by Foolbox."""
        raise_if_kwargs(kwargs)
        x, restore_type = ep.astensor_(inputs)
        found = self._exported(model, x.raw, get_criterion(criterion), epsilon)
        return restore_type(ep.astensor(found.x_adv))


class ExportedMinimizationAttack(MinimizationAttack):  # type: ignore[misc]
    """A robplug attack that looks for the smallest distance."""

    def __init__(self, exported: _Exported) -> None:
        self._exported = exported

    @property
    def distance(self) -> Any:
        """Foolbox's distance of the norm."""
        return DISTANCES[self._exported.norm]

    def run(self, model: Any, inputs: Any, criterion: Any, *, early_stop: float | None = None, **kwargs: Any) -> Any:
        """Attacks once for all epsilons; called by Foolbox, whose ``early_stop`` is a hint that is not taken."""
        raise_if_kwargs(kwargs)
        x, restore_type = ep.astensor_(inputs)
        found = self._exported(model, x.raw, get_criterion(criterion), None)
        return restore_type(ep.astensor(found.x_adv))


class UnclippedAttack(FoolboxAttack):  # type: ignore[misc]
    """A robplug attack under a norm that Foolbox cannot clip to.

    Args:
        exported: the attack.
        times: number of runs; of each sample the first success is kept, or the nearest where there is no epsilon.
    """

    def __init__(self, exported: _Exported, times: int = 1) -> None:
        if times < 1:
            raise InputError("times >= 1", times)
        self._exported = exported
        self._times = times

    def repeat(self, times: int) -> UnclippedAttack:
        """Returns the attack run ``times`` times, with random numbers that differ."""
        return UnclippedAttack(self._exported, self._times * times)

    def __call__(self, model: Any, inputs: Any, criterion: Any, *, epsilons: Any, **kwargs: Any) -> Any:
        """Attacks; returns raw, clipped (the same) and is_adv, lists of them for several epsilons."""
        raise_if_kwargs(kwargs)
        x, restore_type = ep.astensor_(inputs)
        verify_input_bounds(x, model)
        criterion = get_criterion(criterion)
        several = isinstance(epsilons, Iterable)
        results = [self._best(model, x.raw, criterion, eps) for eps in (epsilons if several else [epsilons])]
        x_advs = [restore_type(ep.astensor(x_adv)) for x_adv, _ in results]
        successes = restore_type(ep.astensor(torch.stack([success for _, success in results])))
        return (x_advs, list(x_advs), successes) if several else (x_advs[0], x_advs[0], successes[0])

    def _best(self, model: Any, x: Tensor, criterion: Any, eps: float | None) -> tuple[Tensor, Tensor]:
        """Returns x_adv and whether it is adversarial inside eps."""
        norm = registry().norm(self._exported.norm)
        bounds = (float(model.bounds.lower), float(model.bounds.upper))
        allowed = float("inf") if eps is None else norm.allowed(eps, x[:1].numel(), bounds)
        best = x.clone()
        nearest = torch.full((len(x),), float("inf"), dtype=torch.float64, device=x.device)
        budget = None if self._exported.spec.budget == "minimal" else eps
        for run in range(self._times):
            found = self._exported(model, x, criterion, budget)
            distance = norm.distance(x, found.x_adv, found.witness)
            success = criterion(found.x_adv, model(found.x_adv)) & (distance <= allowed)
            better = success & ((distance < nearest) if eps is None else nearest.isinf())
            take = better | (nearest.isinf() if run == 0 else torch.zeros_like(better))
            best = torch.where(take.view(-1, *[1] * (x.dim() - 1)), found.x_adv, best)
            nearest = torch.where(better, distance, nearest)
        return best, nearest.isfinite()

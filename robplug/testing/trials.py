"""One call of an attack under test, and targets that hide what an attack says it does not need."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor, nn

from robplug.isolation import ModuleState
from robplug.registry import resolve
from robplug.rng import Rng
from robplug.targets import Target
from robplug.testing.fixtures import Scene
from robplug.types import AttackSpec, Perturbed, ThreatModel

PIXEL_RADII = {"linf": 0.1, "l2": 1.0, "l1": 8.0}
"""Radii for data of width 1; they break most samples of `robplug.testing.fixtures.network`."""
RADII = {"l0": 8.0}
ANY_RADIUS = 0.5


def require(condition: bool | Tensor, message: str) -> None:
    """Raises AssertionError with a message of one line unless the condition holds."""
    if not bool(condition):
        raise AssertionError(message)


@dataclass(frozen=True)
class Trial:
    """One call of an attack: a check varies one thing of it at a time.

    Attributes:
        spec: the attack, made with the parameters of its Spec.
        target: the model.
        x: samples.
        y: labels, or None.
        threat: what is allowed.
        y_goal: classes to reach, or None.
        ids: of the samples' random streams.
        seed: of the random streams.
    """

    spec: AttackSpec
    target: Target
    x: Tensor
    y: Tensor | None
    threat: ThreatModel
    y_goal: Tensor | None
    ids: Sequence[int]
    seed: int = 0

    def call(self) -> Perturbed:
        """Calls the attack with the tensors and the model themselves, and returns what it returns."""
        attack = resolve(self.spec)(**self.spec.params)
        rng = Rng(self.seed, self.ids)
        returned = attack.run(self.target, self.x, self.y, self.threat, rng, y_goal=self.y_goal)
        require(isinstance(returned, Perturbed), f"run returned a {type(returned).__name__}, expected a Perturbed")
        return returned  # type: ignore[no-any-return]

    def run(self) -> Perturbed:
        """Calls the attack on copies and tidies up after it, so that one broken rule does not look like many."""
        state = ModuleState(self.target.module)
        copies = dataclasses.replace(self, x=self.x.clone(), y=_copy(self.y), y_goal=_copy(self.y_goal))
        result = copies.call()
        state.restore()
        return dataclasses.replace(result, x_adv=result.x_adv.detach().to(self.x.dtype))

    def rows(self, rows: slice) -> Trial:
        """Returns the trial of some of the samples, with their own labels, goals and streams."""
        y = None if self.y is None else self.y[rows]
        y_goal = None if self.y_goal is None else self.y_goal[rows]
        return dataclasses.replace(self, x=self.x[rows], y=y, y_goal=y_goal, ids=self.ids[rows])

    def towards(self, y_goal: Tensor) -> Trial:
        """Returns the targeted trial with these goals."""
        return dataclasses.replace(self, threat=dataclasses.replace(self.threat, targeted=True), y_goal=y_goal)

    def within(self, eps: float) -> Trial:
        """Returns the trial with another radius, if the attack takes one."""
        if self.spec.budget == "minimal":
            return self
        return dataclasses.replace(self, threat=dataclasses.replace(self.threat, eps=eps))

    def on(self, module: nn.Module, offers: str) -> Trial:
        """Returns the trial with another module in the target."""
        return dataclasses.replace(self, target=dataclasses.replace(self.target, module=module, offers=offers))


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def trial(spec: AttackSpec, scene: Scene, norm: str | None = None) -> Trial:
    """Returns an untargeted trial (targeted where the attack can nothing else) in one of the attack's norms.

    Raises:
        SkipTest: the attack serves no classification, or must be fitted first.
    """
    if "classification" not in spec.tasks:
        raise SkipTest(f"its tasks are {', '.join(spec.tasks)}; only classification is checked")
    if spec.scope != "sample":
        raise SkipTest("an attack that is fitted first is not checked")
    norm = norm or spec.norms[0]
    eps = None if spec.budget == "minimal" else radius(norm, scene.target.bounds)
    threat = ThreatModel(norm, eps, scene.target.bounds)
    made = Trial(spec, scene.target, scene.x.clone(), scene.y.clone(), threat, None, range(100, 100 + len(scene.x)))
    return made if spec.untargeted else made.towards(scene.ranked(1))


def radius(norm: str, bounds: tuple[float, float]) -> float:
    """Returns a radius in the units of a norm; pixel norms scale with the width of the data."""
    if norm in PIXEL_RADII:
        return PIXEL_RADII[norm] * (bounds[1] - bounds[0])
    return RADII.get(norm, ANY_RADIUS)


class NoGradients(nn.Module):
    """A model whose logits have no gradient: whoever asks for one is stopped, and remembered."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.asked = False

    def forward(self, x: Tensor) -> Tensor:
        return _Forbidden.apply(self.module(x), self)  # type: ignore[no-any-return, no-untyped-call]


class _Forbidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, model: NoGradients) -> Tensor:
        ctx.model = model
        return logits.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        ctx.model.asked = True
        raise RuntimeError("this model has no gradient")


class LabelsOnly(nn.Module):
    """A model that says which class wins, and nothing else."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        logits = self.module(x)
        return torch.nn.functional.one_hot(logits.argmax(1), logits.shape[1]).to(logits.dtype)

"""The paper's attackers: PGD, and what is left of it without its projection or without its random start."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from robplug.attacks import make_problem
from robplug.errors import InputError
from robplug.loop import Steps, ascend
from robplug.norms import LinfBall
from robplug.plugins import registry
from robplug.step import Step, attacking
from robplug.targets import Target
from robplug.types import ThreatModel

Name = Literal["pgd", "gd", "i-fgsm"]
Goal = Literal["untargeted", "random"]


@dataclass(frozen=True)
class Attacker:
    """Signed gradient steps from the label or towards a goal, on the network in eval mode; no buffer of it changes.

    Source: Xie et al. 2020, Adversarial Examples Improve Image Recognition, sections 5.1 and 5.4.

    Attributes:
        name: ``"pgd"``; ``"gd"`` without projection onto the ball; ``"i-fgsm"`` without random start.
        eps: largest change of a value, in units of the data; of the random start alone for ``"gd"``.
        steps: number of steps; None means the paper's eps / step_size + 1, or 1 if eps is no longer than a step.
        step_size: length of a step.
        goal: ``"untargeted"`` leaves the label; ``"random"`` makes for a class drawn uniformly from the wrong ones.
    """

    name: Name
    eps: float
    steps: int | None
    step_size: float
    goal: Goal = "untargeted"

    def __post_init__(self) -> None:
        if self.name not in get_args(Name):
            raise InputError(f"attack to be one of {', '.join(get_args(Name))}", repr(self.name))
        if self.goal not in get_args(Goal):
            raise InputError(f"goal to be one of {', '.join(get_args(Goal))}", repr(self.goal))
        if not 0 < self.step_size < math.inf:
            raise InputError("a finite step_size > 0", self.step_size)
        ThreatModel("linf", self.eps)
        self.how()

    def how(self) -> Steps:
        """Returns the steps to be made."""
        whole = math.ceil(self.eps / self.step_size - 1e-6)  # 3 * 0.1 / 0.1 is a little more than 3
        steps = self.steps if self.steps is not None else 1 if whole <= 1 else whole + 1
        return Steps(steps, self.step_size, random_start=self.name != "i-fgsm", early_stop=False)

    def run(self, step: Step) -> Tensor:
        """Returns the adversarial samples of a batch, (N, ...)."""
        with attacking(step.model):
            target = registry().target(step.model, bounds=step.bounds)
            y_goal = None if self.goal == "untargeted" else _wrong(target, step)
            threat = ThreatModel("linf", self.eps, step.bounds, targeted=y_goal is not None)
            problem = make_problem(target, step.x, step.y, threat, step.rng, y_goal)
            if self.name == "gd":
                problem = dataclasses.replace(problem, ball=_Free(step.x.detach(), self.eps, step.bounds))
            return ascend(problem, self.how()).x_adv


def _wrong(target: Target, step: Step) -> Tensor:
    """Returns (N,) classes other than the labels."""
    classes = target.count_classes(step.x)
    return (step.y + 1 + step.rng.integers(classes - 1, device=step.y.device)) % classes


@dataclass(frozen=True)
class _Free(LinfBall):
    """A ball in which one starts, and which one may leave."""

    def project(self, z: Tensor) -> Tensor:
        return z.clamp_(*self.bounds)

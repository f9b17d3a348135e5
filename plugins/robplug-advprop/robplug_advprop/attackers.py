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
from robplug.types import ThreatModel

Name = Literal["pgd", "gd", "i-fgsm"]


@dataclass(frozen=True)
class Attacker:
    """Signed gradient steps towards a larger loss, on the network in eval mode; no buffer of it changes.

    Source: Xie et al. 2020, Adversarial Examples Improve Image Recognition, sections 5.1 and 5.4.

    Attributes:
        name: ``"pgd"``; ``"gd"`` without projection onto the ball; ``"i-fgsm"`` without random start.
        eps: largest change of a value, in units of the data; of the random start alone for ``"gd"``.
        steps: number of steps; None means the paper's eps / step_size + 1, or 1 if eps is no longer than a step.
        step_size: length of a step.
    """

    name: Name
    eps: float
    steps: int | None
    step_size: float

    def __post_init__(self) -> None:
        if self.name not in get_args(Name):
            raise InputError(f"attack to be one of {', '.join(get_args(Name))}", repr(self.name))
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
            threat = ThreatModel("linf", self.eps, step.bounds)
            problem = make_problem(target, step.x, step.y, threat, step.rng, None)
            if self.name == "gd":
                problem = dataclasses.replace(problem, ball=_Free(step.x.detach(), self.eps, step.bounds))
            return ascend(problem, self.how()).x_adv


@dataclass(frozen=True)
class _Free(LinfBall):
    """A ball in which one starts, and which one may leave."""

    def project(self, z: Tensor) -> Tensor:
        return z.clamp_(*self.bounds)

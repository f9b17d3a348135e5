"""Baseline attacks, and the floor for speed: FGSM, PGD and noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robplug.errors import InputError, ThreatError
from robplug.inputs import check_batch
from robplug.loop import Problem, Steps, Transform, ascend
from robplug.norms import Ball
from robplug.plugins import registry
from robplug.rng import Rng
from robplug.targets import Target, settled
from robplug.types import Perturbed, ThreatModel


@dataclass(frozen=True)
class FGSM:
    """One step of length eps along the steepest direction of the norm.

    Source: Goodfellow, Shlens and Szegedy 2015, section 4 (linf); l2 and l1 by the same argument.
    """

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
        eps = radius(threat)
        problem = make_problem(target, x, y, threat, rng, y_goal)
        return ascend(problem, Steps(steps=1, step_size=eps, early_stop=False))


@dataclass(frozen=True)
class PGD:
    """Projected gradient descent on the cross-entropy.

    Source: Madry et al. 2018, section 2.1.
    Differs: a sample leaves the batch as soon as an iterate breaks it, unless ``early_stop`` is off.

    Attributes:
        steps: number of gradient steps.
        step_size: length of a step in the norm; None means 2.5 * eps / steps.
        random_start: start from a random point of the ball.
        restarts: number of starts.
        early_stop: broken samples leave the batch; off where the last iterate itself is wanted.
        transform: applied to the images before each gradient, such as input diversity: a function of the images and of
            a `robplug.rng.Rng`, a stream per sample. Plans cannot name one. On its account no sample leaves the batch.
        draws: number of transforms whose gradients are averaged in a step.
    """

    steps: int = 20
    step_size: float | None = None
    random_start: bool = True
    restarts: int = 1
    early_stop: bool = True
    transform: Transform | None = None
    draws: int = 1

    def __post_init__(self) -> None:
        # refuses what makes no sense
        Steps(steps=self.steps, step_size=self.step_size or 0.0, restarts=self.restarts, draws=self.draws)
        if self.transform is not None and not callable(self.transform):
            remedy = "give it in Python; a plan names no functions"
            raise InputError("a transform that is a function of images and streams", repr(self.transform), remedy)

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
        eps = radius(threat)
        how = Steps(
            steps=self.steps,
            step_size=2.5 * eps / self.steps if self.step_size is None else self.step_size,
            random_start=self.random_start,
            restarts=self.restarts,
            early_stop=self.early_stop,
            transform=self.transform,
            draws=self.draws,
        )
        return ascend(make_problem(target, x, y, threat, rng, y_goal), how)


@dataclass(frozen=True)
class Noise:
    """Random points of the ball: what an attack must beat to have done anything.

    Attributes:
        draws: points tried per sample; the first that breaks it is kept.
    """

    draws: int = 10

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise InputError("draws >= 1", self.draws)

    @torch.no_grad()
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
        radius(threat)
        problem = make_problem(target, x, y, threat, rng, y_goal)
        x_adv, broken = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for draw in range(self.draws if len(x) else 0):
            left = ~broken
            part = problem.select(left)
            x_adv[left] = part.ball.random(rng.at_restart(draw).select(left))
            with settled(target.module):
                broken[left] = part.beaten(x_adv[left])
            if bool(broken.all()):
                break
        return Perturbed(x_adv, None, broken)


def radius(threat: ThreatModel) -> float:
    """Returns the threat's eps, which an attack with a fixed budget cannot do without."""
    if threat.eps is None:
        raise ThreatError("expected a threat with eps, got eps=None; an attack with budget 'minimal' needs none")
    return threat.eps


def make_problem(
    target: Target, x: Tensor, y: Tensor | None, threat: ThreatModel, rng: Rng, y_goal: Tensor | None
) -> Problem:
    """Checks what an attack was given and returns it as a `robplug.loop.Problem`."""
    labels = check_batch(target, x, y, threat, y_goal)
    ball: Ball = registry().norm(threat.norm).ball(x.detach(), threat.eps, threat.bounds)
    return Problem(target, labels, ball, rng, threat.targeted)

"""What the Specs of the fake plugin name."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from robplug.attacks import make_problem, radius
from robplug.data import Dataset
from robplug.defenses import Defense
from robplug.loop import Steps, ascend
from robplug.norms import LinfBall, PixelNorm
from robplug.targets import Target, from_module


@dataclass(frozen=True)
class Step:
    """One signed step.

    Attributes:
        share: length of the step as a share of eps.
    """

    share: float = 0.5

    def run(self, target, x, y, threat, rng, *, y_goal=None):
        problem = make_problem(target, x, y, threat, rng, y_goal)
        return ascend(problem, Steps(steps=1, step_size=self.share * radius(threat), early_stop=False))


@dataclass(frozen=True)
class Decay(Defense):
    """The sum of squares of the weights.

    Attributes:
        strength: factor of the penalty.
    """

    strength: float = 0.1

    def penalty(self, step):
        return self.strength * sum(parameter.square().sum() for parameter in step.model.parameters())


def line(classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))


@dataclass(frozen=True)
class Line:
    """Something that is no nn.Module."""

    slope: float


def from_line(model: Line) -> Target:
    layer = line()
    nn.init.constant_(layer[1].weight, model.slope)
    return from_module(layer, classes=3)


def data(split: str = "test") -> Dataset:
    return Dataset(f"fake {split}", torch.rand(4, 1, 8, 8), torch.arange(4) % 3)


class _Half(PixelNorm):
    def distance(self, x, x_adv, witness=None):
        return super().distance(x, x_adv, witness) / 2

    def ball(self, x, eps, bounds):
        return super().ball(x, None if eps is None else 2 * eps, bounds)


HALF = _Half("half", float("inf"), LinfBall)

"""Norms that each break one rule of the conformance kit; the honest one is robplug's linf."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from robplug import NormSpec
from robplug.norms import LinfBall, PixelNorm


class DriftingOrigin(LinfBall):
    def origin(self):
        return self.x + 1e-3


class WideRandom(LinfBall):
    def random(self, rng):
        return self.project(self.x + 2 * rng.normal(self.x.shape[1:], like=self.x)) * 1.01


class NeighbourlyRandom(LinfBall):
    def random(self, rng):
        noise = rng.uniform(self.x.shape[1:], -self.eps, self.eps, like=self.x)
        return self._inside_box(noise * (self.x < self.x.mean()))


class LooseProject(LinfBall):
    def project(self, z):
        low, high = self.bounds
        return torch.minimum(torch.maximum(z, self.x - 2 * self.eps), self.x + 2 * self.eps).clamp(low, high)


class BoxlessProject(LinfBall):
    def project(self, z):
        return torch.minimum(torch.maximum(z, self.x - self.eps), self.x + self.eps)


class RestlessProject(LinfBall):
    def project(self, z):
        return super().project(z * 0.9)


class SelectsFirst(LinfBall):
    def select(self, keep):
        return type(self)(self.x[: int(keep.sum())], self.eps, self.bounds)


class DetachedDecode(LinfBall):
    def decode(self, z):
        return z.detach()


class DescendingSteepest(LinfBall):
    def steepest(self, gradient, z):
        return -gradient.sign()


@dataclass(frozen=True)
class SinglePrecision(PixelNorm):
    def distance(self, x, x_adv, witness=None):
        return super().distance(x, x_adv, witness).float()


@dataclass(frozen=True)
class BatchDistance(PixelNorm):
    def distance(self, x, x_adv, witness=None):
        return super().distance(x, x_adv, witness).max()


@dataclass(frozen=True)
class NeverZero(PixelNorm):
    def distance(self, x, x_adv, witness=None):
        return super().distance(x, x_adv, witness) + 1e-9


@dataclass(frozen=True)
class Generous(PixelNorm):
    def allowed(self, eps, values, bounds):
        return 1.5 * eps


INFINITE = float("inf")
honest: Any = PixelNorm("linf", INFINITE, LinfBall)
misnamed: Any = PixelNorm("l8", INFINITE, LinfBall)
single_precision = SinglePrecision("linf", INFINITE, LinfBall)
batch_distance = BatchDistance("linf", INFINITE, LinfBall)
never_zero = NeverZero("linf", INFINITE, LinfBall)
generous = Generous("linf", INFINITE, LinfBall)


def __getattr__(name: str) -> Any:
    """An infinity norm with one of the balls above, by the ball's name in lower case."""
    balls = {ball.__name__.lower(): ball for ball in LinfBall.__subclasses__()}
    if name not in balls:
        raise AttributeError(name)
    return PixelNorm("linf", INFINITE, balls[name])


def spec(name: str) -> NormSpec:
    """The Spec of one of the objects above."""
    return NormSpec(name="linf", make=f"{__name__}:{name}")


HONEST = (spec("honest"),)

# the Spec, the only checks that fail on it, and what one of their messages says
WRONG: tuple[tuple[NormSpec, set[str], str], ...] = (
    (spec("misnamed"), {"name"}, "its name is 'l8'"),
    (spec("single_precision"), {"distance"}, "torch.float32"),
    (spec("never_zero"), {"distance"}, "the distance of x to itself is 1e-09"),
    (spec("batch_distance"), {"distance"}, "expected (N,) float64"),
    (spec("generous"), {"allowed"}, "allows"),
    (spec("driftingorigin"), {"origin", "distance"}, "decode(origin()) is not x"),
    (spec("widerandom"), {"random"}, "random(rng) gives"),
    (spec("neighbourlyrandom"), {"random_per_sample"}, "depends on its neighbours"),
    (spec("looseproject"), {"project"}, "project gives a distance"),
    (spec("boxlessproject"), {"project"}, "project gives values"),
    (spec("restlessproject"), {"project_keeps_inside"}, "project moves a point that is inside"),
    (spec("selectsfirst"), {"select"}, "select(keep)"),
    (spec("detacheddecode"), {"differentiable"}, "raised RuntimeError"),
    (spec("descendingsteepest"), {"differentiable"}, "steepest leads down"),
)

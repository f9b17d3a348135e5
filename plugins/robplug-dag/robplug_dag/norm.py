"""The threat norm of perceptibility: the root of a perturbation's mean square over pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from robplug.norms import L2Ball
from robplug.rng import Rng
from robplug_dag.measures import perceptibility


@dataclass(frozen=True)
class PerceptibilityBall:
    """Images around clean ones; an l2 ball whose radius grows with the root of the number of pixels K.

    Attributes:
        ball: the l2 ball, of radius eps * sqrt(K).
    """

    ball: L2Ball

    def origin(self) -> Tensor:
        """Returns the clean images."""
        return self.ball.origin()

    def random(self, rng: Rng) -> Tensor:
        """Returns images that are uniform in the ball, but for the bounds."""
        return self.ball.random(rng)

    def decode(self, z: Tensor) -> Tensor:
        """Returns z, which is the image."""
        return z

    def steepest(self, gradient: Tensor, z: Tensor) -> Tensor:
        """Returns the direction of the gradient with perceptibility 1."""
        return self.ball.steepest(gradient, z).mul_(_root_of_pixels(z))

    def project(self, z: Tensor) -> Tensor:
        """Shortens a change that is too long, and cuts to the bounds."""
        return self.ball.project(z)

    def witness(self, z: Tensor) -> None:
        """Returns nothing: images are all that is measured."""

    def select(self, keep: Tensor) -> PerceptibilityBall:
        """Returns the ball of some of the images."""
        ball = self.ball
        return PerceptibilityBall(L2Ball(ball.x[keep], ball.eps, ball.bounds))


@dataclass(frozen=True)
class PerceptibilityNorm:
    """p = sqrt(mean over pixels of |x_adv - x|^2), in units of the data: the paper's where images go from 0 to 1.

    Source: Xie et al. 2017; section 2.3.5 of the dissertation.

    Attributes:
        name: as in a threat.
    """

    name: str

    def distance(self, x: Tensor, x_adv: Tensor, witness: Tensor | None = None) -> Tensor:
        """Returns p, (N,) float64, of images (N, C, ...); the witness is not needed."""
        return perceptibility(x_adv.double() - x.double())

    def measures(self, x: Tensor, x_adv: Tensor, witness: Tensor | None = None) -> dict[str, Tensor]:
        """Returns the largest absolute change of a value, (N,) float64, under ``"linf"``."""
        return {"linf": (x_adv.double() - x.double()).flatten(1).abs().amax(1)}

    def allowed(self, eps: float, values: int, bounds: tuple[float, float]) -> float:
        """Returns eps and the rounding of float32 images: half a unit in the last place of each of four channels."""
        return eps * (1 + 1e-6) + 2 * 2.0**-24 * max(abs(bounds[0]), abs(bounds[1]))

    def ball(self, x: Tensor, eps: float | None, bounds: tuple[float, float]) -> PerceptibilityBall:
        """Returns the ball of radius eps (None: no limit) around each image."""
        radius = math.inf if eps is None else eps * _root_of_pixels(x)
        return PerceptibilityBall(L2Ball(x, radius, bounds))


def _root_of_pixels(x: Tensor) -> float:
    return math.sqrt(math.prod(x.shape[2:]))


PERCEPTIBILITY = PerceptibilityNorm("dag/perceptibility")

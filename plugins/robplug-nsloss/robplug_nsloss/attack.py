"""The paper's adaptive attacks: C&W from random starts, and with averaged gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from robplug.attacks import make_problem
from robplug.carlini import CarliniWagner, check_minimal
from robplug.errors import InputError
from robplug.norms import L2Ball
from robplug.rng import Rng
from robplug.targets import Substitute, Target
from robplug.types import Perturbed, ThreatModel


@dataclass(frozen=True)
class _AdaptiveCarliniWagner:
    """What both attacks share: parameters and search of `robplug.carlini.CarliniWagner`.

    No library has them: Foolbox's L2CarliniWagnerAttack (3.3), ART's CarliniL2Method (1.20) and torchattacks' CW (3.5)
    start at the sample, draw nothing and take one gradient a step; Foolbox's ``repeat`` runs the same attack again.

    Attributes:
        steps: of Adam for each constant.
        step_size: learning rate of Adam; the paper has 0.1 for MNIST.
        confidence: lead in logits that is aimed at; the paper's high confidence is 5.
        binary_search_steps: number of constants c.
        initial_const: first c; without success it grows tenfold; the paper has 10 for MNIST.
        abort_early: a sample whose loss stalls is done with this c; without, all steps are taken.
    """

    steps: int = 1000
    step_size: float = 0.01
    confidence: float = 0.0
    binary_search_steps: int = 9
    initial_const: float = 1e-3
    abort_early: bool = True

    def __post_init__(self) -> None:
        self._search((0.0, 1.0))  # refuses what makes no sense

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
        """Attacks samples (N, ...) under an l2 threat without eps; see `robplug.types.Attack.run`.

        Raises:
            InputError: a tensor does not fit.
            ThreatError: the norm is not l2, there is an eps, or the target has no gradients.
        """
        check_minimal(threat, "robplug/pgd")
        return self._search(threat.bounds).search(make_problem(target, x, y, threat, rng, y_goal))

    def _search(self, bounds: tuple[float, float]) -> CarliniWagner:
        return CarliniWagner(
            steps=self.steps,
            step_size=self.step_size,
            confidence=self.confidence,
            binary_search_steps=self.binary_search_steps,
            initial_const=self.initial_const,
            abort_early=self.abort_early,
        )


@dataclass(frozen=True)
class RestartedCarliniWagner(_AdaptiveCarliniWagner):
    """C&W from several starts; each sample keeps its nearest result.

    The first start is the sample itself, so that the distance is never larger than that of C&W with the same
    parameters. The others are the sample and a change in a uniform direction, clipped to the bounds.

    Source: Fidel et al. 2020, section IV.A, attack restarts with random initialization, and table II.
    Differs: in the paper each of the 400 starts is random, and its length is not told; 10 starts are the default here,
        as its figure 1a falls in the first few only.

    Attributes:
        restarts: number of starts.
        start_radius: l2 length of the change of a start, in units of the data, before it is clipped.
    """

    restarts: int = 10
    start_radius: float = 1.0

    def _search(self, bounds: tuple[float, float]) -> CarliniWagner:
        return replace(super()._search(bounds), restarts=self.restarts, start_radius=self.start_radius)


@dataclass(frozen=True)
class AveragedCarliniWagner(_AdaptiveCarliniWagner):
    """C&W whose gradients are means over random points of an l2 ball around the current images.

    An image counts as found by what the model says of it, and not of the points around it.

    Source: Fidel et al. 2020, section IV.A, gradient expectation over randomness, and table II.
    Differs: points are uniform in the ball (the paper says random) and clipped to the bounds, without effect on the
        gradient that is taken there.

    Attributes:
        draws: number of points, whose gradients are averaged in each step.
        radius: of the l2 ball, in units of the data.
    """

    draws: int = 10
    radius: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.radius < float("inf"):
            raise InputError("a finite radius > 0", self.radius)

    def _search(self, bounds: tuple[float, float]) -> CarliniWagner:
        around = partial(nearby, radius=self.radius, bounds=bounds)
        return replace(super()._search(bounds), transform=around, draws=self.draws)


def nearby(x: Tensor, rng: Rng, radius: float, bounds: tuple[float, float]) -> Tensor:
    """Draws a uniform point of the l2 ball around each sample, clipped to the bounds.

    Args:
        x: (N, ...) samples.
        rng: a stream per sample.
        radius: in units of the data.
        bounds: of the data.

    Returns:
        (N, ...); its derivative by x is the identity, also where it was clipped.
    """
    point = L2Ball(x.detach(), radius, bounds).random(rng)
    return Substitute.apply(point, x)  # type: ignore[no-any-return, no-untyped-call]

"""Flow attacks with signed gradient steps inside a budget: one step, and several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from robplug.attacks import make_problem, radius
from robplug.errors import InputError, ThreatError
from robplug.loop import Problem, Steps, ascend
from robplug.rng import Rng
from robplug.targets import Target
from robplug.types import Perturbed, ThreatModel
from robplug_flow.norm import FlowBall

NORMS = ("flow", "flow-normalized")


def flow_problem(
    target: Target,
    x: Tensor,
    y: Tensor | None,
    threat: ThreatModel,
    rng: Rng,
    y_goal: Tensor | None,
    gradients: bool = True,
) -> Problem:
    """Checks what a flow attack was given and returns it as a `robplug.loop.Problem`, whose ball is a `FlowBall`.

    Raises:
        ThreatError: the threat is none of flows, or the target does not offer what the attack needs.
        InputError: a tensor does not fit, or the images have no rows and columns.
    """
    if threat.norm not in NORMS:
        raise ThreatError(f"expected a threat with norm {' or '.join(NORMS)}, got {threat.norm!r}")
    if gradients and target.offers != "gradients":
        remedy = "flow/gradient-free needs scores only"
        raise ThreatError(f"expected a target with gradients, got one with {target.offers}; {remedy}")
    return make_problem(target, x, y, threat, rng, y_goal)


@dataclass(frozen=True)
class SingleStep:
    """One step of length eps along the sign of the flow gradient at no flow.

    No flow is a kink of bilinear interpolation; the gradient there is that of forward differences.

    Source: flow-gradient paper, section 5.2; equation 1 with a flow in place of the noise.
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
        """Attacks images (N, C, H, W); the witness is the flow in pixels, (row, column)."""
        problem = flow_problem(target, x, y, threat, rng, y_goal)
        return ascend(problem, _single(radius(threat)))


@dataclass(frozen=True)
class MultiStep:
    """Signed gradient steps on the cross-entropy, each flow clamped to the budget.

    Of each sample the first flow that breaks it is kept: that of the single step, of the steps from no flow, or of the
    steps from random flows. It is therefore never weaker than `SingleStep`.

    Source: flow-gradient paper, section 5.2; equation 2 with a flow in place of the noise.
    Differs: the paper starts from no flow only (``restarts=1``) and has no single step beside it.

    Attributes:
        steps: number of gradient steps.
        step_size: length of a step in the norm's unit; None means eps / steps from no flow, as in the authors' code,
            and 2 * eps / steps from a random one, so that the whole ball can be crossed.
        random_start: begin at a random flow the first time, too.
        restarts: number of starts; all but the first begin at random flows.
        early_stop: broken samples leave; off, each start's last flow is judged, as in the textbook.
        ladder: smaller radii of the norm to be climbed first; what one breaks stays broken, and the flow that it
            reached is one more start. With one ladder for all radii of a plan, a larger radius never breaks fewer.
    """

    steps: int = 20
    step_size: float | None = None
    random_start: bool = False
    restarts: int = 2
    early_stop: bool = True
    ladder: Sequence[float] = ()

    def __post_init__(self) -> None:
        for name in ("steps", "restarts"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} >= 1", getattr(self, name))
        if not all(rung >= 0 for rung in self.ladder):
            raise InputError("a ladder of radii >= 0", list(self.ladder))

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
        """Attacks images (N, C, H, W); the witness is the flow in pixels, (row, column)."""
        eps = radius(threat)
        problem = flow_problem(target, x, y, threat, rng, y_goal)
        flow = problem.ball.origin()
        broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        reached = None
        for rung in (*sorted(rung for rung in self.ladder if rung < eps), eps):
            for how, start in self._starts(rung, reached):
                flow, broken = _try_rest(problem, rung, how, start, flow, broken)
            reached = flow
        with torch.no_grad():
            return Perturbed(problem.ball.decode(flow), flow, broken)

    def _starts(self, eps: float, reached: Tensor | None) -> list[tuple[Steps, Tensor | None]]:
        """Returns how to move inside a radius, and the flow to begin at if it is neither none nor random."""
        size, wide = (factor * eps / self.steps if self.step_size is None else self.step_size for factor in (1, 2))
        plain = Steps(self.steps, size, early_stop=self.early_stop)
        starts: list[tuple[Steps, Tensor | None]] = [(_single(eps), None)]
        if not self.random_start:
            starts.append((plain, None))
        if reached is not None:
            starts.append((plain, reached))
        count = self.restarts if self.random_start else self.restarts - 1
        if count:
            starts.append((replace(plain, step_size=wide, random_start=True, restarts=count), None))
        return starts


def _single(eps: float) -> Steps:
    return Steps(steps=1, step_size=eps, early_stop=False)


def _try_rest(
    problem: Problem, eps: float, how: Steps, start: Tensor | None, flow: Tensor, broken: Tensor
) -> tuple[Tensor, Tensor]:
    """Moves the samples that still stand inside a radius; returns all flows, and whether they break their samples."""
    left = ~broken
    if not bool(left.any()):
        return flow, broken
    ball = replace(cast(FlowBall, problem.ball), eps=eps, start=start)
    part = replace(problem, ball=ball).select(left)
    found = ascend(part, how)
    reached = cast(Tensor, found.witness)  # a FlowBall gives one
    claim = found.claim
    if claim is None:
        with torch.no_grad():
            claim = part.broken(part.target.logits(found.x_adv))
    return flow.masked_scatter(left.view(-1, 1, 1, 1), reached), broken.masked_scatter(left, claim)

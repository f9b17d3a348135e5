"""The optimisation-based attack: the smoothest flow that changes the class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from robplug.errors import InputError, ThreatError
from robplug.loop import Problem, lead
from robplug.rng import Rng
from robplug.targets import Target
from robplug.types import Perturbed, ThreatModel
from robplug_flow.attack import flow_problem
from robplug_flow.kernels.ops import flow_smoothness
from robplug_flow.kernels.reference import SOFTENING
from robplug_flow.units import UNITS, Unit, pixels_per_unit

Optimizer = Literal["sgd", "lbfgs"]
Neighbours = Literal["adjacent", "diagonal"]


@dataclass(frozen=True)
class StAdv:
    """Minimises L_adv + tau * L_flow over flows, without a budget, and keeps the smoothest flow that breaks the sample.

    L_adv = max(z_y - max of the other logits, -kappa), or for a goal t max(max of the others - z_t, -kappa). L_flow is
    `robplug_flow.flow_smoothness`. What is minimised is roughness; the distance in a table is max |v| of what is found.

    Convention: a flow in pixels, (row, column); the loss's unit is ``unit``.
    Source: flow-gradient paper, sections 3.1 and 5.2; Xiao et al. 2018, Spatially Transformed Adversarial Examples,
        equations 2 to 4.
    Differs: the best iterate is returned, not the last. Steps of SGD shrink linearly to 0, and the flow loss is
        softened as far as its curvature needs for a step of that size. The paper's balance c = 10 stands here as
        tau = 1/c in normalised units: its equation 3 would weigh the flow by c, which breaks almost nothing, and no
        code was released. ``tau=10`` is that reading.

    Attributes:
        tau: weight of the flow loss.
        unit: of the flow in the flow loss: ``"normalized"`` as in the paper, or ``"pixel"`` as in common code.
        kappa: lead in logits beyond which a sample pulls no more; at 0 the iterates stop on the boundary itself.
        neighbours: of a pixel in the flow loss: the four ``"adjacent"`` ones as in the text, or the four ``"diagonal"``
            ones as in common code.
        optimizer: ``"sgd"`` as in the paper, or ``"lbfgs"`` (strong Wolfe line search), which goes sample by sample.
        steps: number of steps of the optimizer.
        step_size: SGD's largest displacement in the first step, in pixels: it sets each sample's learning rate,
            whatever the scale of the logits. L-BFGS has its line search.
    """

    tau: float = 0.1
    unit: Unit = "normalized"
    kappa: float = 0.5
    neighbours: Neighbours = "adjacent"
    optimizer: Optimizer = "sgd"
    steps: int = 300
    step_size: float = 0.25

    def __post_init__(self) -> None:
        for name in ("tau", "kappa"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"a finite {name} >= 0", getattr(self, name))
        for name, known in (("unit", UNITS), ("neighbours", get_args(Neighbours)), ("optimizer", get_args(Optimizer))):
            if getattr(self, name) not in known:
                raise InputError(f"{name} to be {' or '.join(known)}", repr(getattr(self, name)))
        if self.steps < 1:
            raise InputError("steps >= 1", self.steps)
        if not 0 < self.step_size < float("inf"):
            raise InputError("a finite step_size > 0", self.step_size)

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
        """Attacks images (N, C, H, W) under a threat without eps; the witness is the flow in pixels, (row, column)."""
        if threat.eps is not None:
            remedy = "it looks for the smallest distortion; flow/multi-step keeps to a radius"
            raise ThreatError(f"flow/stadv: expected a threat with eps=None, got {threat.eps}; {remedy}")
        problem = flow_problem(target, x, y, threat, rng, y_goal)
        if self.optimizer == "sgd" or len(x) == 0:
            found = self._sgd(problem)
        else:
            # torch's L-BFGS has one curvature and one line search for all that it is given
            each = torch.eye(len(x), dtype=torch.bool, device=x.device)
            parts = [self._lbfgs(problem.select(one)) for one in each]
            found = _Best(
                *(torch.cat(tensors) for tensors in zip(*(vars(part).values() for part in parts), strict=True))
            )
        with torch.no_grad():
            return Perturbed(problem.ball.decode(found.flow), found.flow, found.broken)

    def _sgd(self, problem: Problem) -> _Best:
        search = _Search(problem, self)
        flow = problem.ball.origin()
        if len(flow) == 0:
            return search.best
        _, gradient = search.slope(flow)
        steepest = gradient.abs().amax((1, 2, 3), keepdim=True)
        # an image without any slope goes nowhere at any rate
        rate = torch.where(steepest > 0, self.step_size / steepest, torch.zeros_like(steepest))
        for step in range(self.steps):
            size = rate * (1 - step / self.steps)
            if step:
                _, gradient = search.slope(flow, softening=search.curvature * size)
            flow = flow - size * gradient
        with torch.no_grad():
            search.objective(flow)
        return search.best

    def _lbfgs(self, problem: Problem) -> _Best:
        search = _Search(problem, self)
        flow = problem.ball.origin().requires_grad_()
        # tolerances of 0, as torch's know nothing of the scale of logits and flows
        optimizer = torch.optim.LBFGS(
            [flow], max_iter=self.steps, tolerance_grad=0.0, tolerance_change=0.0, line_search_fn="strong_wolfe"
        )

        def closure() -> float:
            value, flow.grad = search.slope(flow.detach())
            return float(value.sum())

        optimizer.step(closure)
        return search.best


class _Search:
    """The objective of a batch, which looks at every flow that it is asked about.

    Attributes:
        best: the best flows so far.
        curvature: of the flow loss times its weight, in pixels, for a softening of 1.
    """

    def __init__(self, problem: Problem, attack: StAdv) -> None:
        self._problem = problem
        self._attack = attack
        self.best = _Best.nothing(problem.ball.origin())
        sides = pixels_per_unit(attack.unit, *self.best.flow.shape[2:])
        # nothing moves along an axis of one pixel, whose unit is 0
        factors = [1 / side if side else 0.0 for side in sides]
        self._scale = self.best.flow.new_tensor(factors).view(2, 1, 1)
        # each pair counts twice, and the Laplacian of a grid with four neighbours has eigenvalues up to 8
        self.curvature = 16 * attack.tau * max(factors) ** 2

    def slope(self, flow: Tensor, softening: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the objective, (N,), and its gradient at a flow."""
        flow = flow.detach().requires_grad_()
        with torch.enable_grad():
            value = self.objective(flow, softening)
        (gradient,) = torch.autograd.grad(value.sum(), flow)
        if not bool(gradient.isfinite().all()):
            raise ThreatError("flow/stadv: expected a finite gradient of the target, got nan or inf")
        return value.detach(), gradient

    def objective(self, flow: Tensor, softening: Tensor | None = None) -> Tensor:
        """Returns L_adv + tau * L_flow, (N,).

        Args:
            flow: (N, 2, H, W) in pixels.
            softening: (N, 1, 1, 1), whose square takes the place of the 1e-8 under the roots if it is more.
        """
        attack, problem = self._attack, self._problem
        logits = problem.target.logits(problem.ball.decode(flow))
        ahead, sure = lead(logits, problem.labels, problem.targeted)
        scaled = flow * self._scale
        with torch.no_grad():
            self.best.look(flow.detach(), ahead, flow_smoothness(scaled, attack.neighbours), sure)
        if softening is None:
            roughness = flow_smoothness(scaled, attack.neighbours)
        else:
            # a smaller flow is softened more by the constant under the root
            share = (SOFTENING**0.5 / softening).clamp(max=1.0)
            roughness = flow_smoothness(scaled * share, attack.neighbours) / share.flatten()
        return attack.tau * roughness - ahead.clamp(max=attack.kappa)


@dataclass
class _Best:
    """The best flow of each sample so far: the smoothest of those that break it, else the one that comes nearest.

    Attributes:
        flow: (N, 2, H, W).
        lead: (N,) as `robplug.loop.lead` has it.
        roughness: (N,) infinite where no flow breaks the sample.
        broken: (N,) bool.
    """

    flow: Tensor
    lead: Tensor
    roughness: Tensor
    broken: Tensor

    @classmethod
    def nothing(cls, flow: Tensor) -> _Best:
        """Returns the state before any flow was looked at."""
        worst = flow.new_full((len(flow),), torch.inf)
        return cls(flow.clone(), -worst, worst, torch.zeros_like(worst, dtype=torch.bool))

    def look(self, flow: Tensor, lead: Tensor, roughness: Tensor, sure: Tensor) -> None:
        """Takes what is better; a lead above ``sure`` counts as broken."""
        breaks = lead > sure
        better = torch.where(breaks, roughness < self.roughness, ~self.broken & (lead > self.lead))
        self.flow = torch.where(better.view(-1, 1, 1, 1), flow, self.flow)
        self.lead = torch.where(better, lead, self.lead)
        self.roughness = torch.where(better & breaks, roughness, self.roughness)
        self.broken |= breaks

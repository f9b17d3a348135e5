"""The optimisation-based attack: the smoothest flow that changes the class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from robplug.errors import InputError, ThreatError
from robplug.loop import Problem
from robplug.rng import Rng
from robplug.targets import Target
from robplug.types import Perturbed, ThreatModel
from robplug_flow.attack import flow_problem, lead
from robplug_flow.kernels.ops import flow_smoothness
from robplug_flow.units import UNITS, Unit, pixels_per_unit

Optimizer = Literal["sgd", "lbfgs"]
Neighbours = Literal["adjacent", "diagonal"]


@dataclass(frozen=True)
class StAdv:
    """Minimises L_adv + tau * L_flow over flows, without a budget, and keeps the smoothest flow that breaks the sample.

    L_adv = max(z_y - max of the other logits, -kappa), or for a goal t max(max of the others - z_t, -kappa). L_flow is
    `robplug_flow.flow_smoothness`. What is minimised is roughness; the distance in a table is max |v| of the flow found.

    Convention: a flow in pixels, (row, column); the loss's unit is ``unit``.
    Source: flow-gradient paper, sections 3.1 and 5.2; Xiao et al. 2018, Spatially Transformed Adversarial Examples,
        equations 2 to 4.
    Differs: the best iterate is returned, not the last; steps of SGD shrink linearly to 0. The paper's balance c = 10
        stands here as tau = 1/c in normalised units: its equation 3 would weigh the flow by c, which breaks almost
        nothing, and no code was released. ``tau=10`` is that reading.

    Attributes:
        tau: weight of the flow loss.
        unit: of the flow in the flow loss: ``"normalized"`` as in the paper, or ``"pixel"`` as in common code.
        kappa: lead in logits beyond which a sample pulls no more; at 0 the iterates stop on the boundary itself.
        neighbours: of a pixel in the flow loss: the four ``"adjacent"`` ones as in the text, or the four ``"diagonal"``
            ones as in common code.
        optimizer: ``"sgd"`` as in the paper, or ``"lbfgs"`` (strong Wolfe line search), which goes sample by sample.
        steps: number of steps of the optimizer.
        step_size: first step of SGD, in pixels per unit of gradient; L-BFGS starts from its own.
    """

    tau: float = 0.1
    unit: Unit = "normalized"
    kappa: float = 0.5
    neighbours: Neighbours = "adjacent"
    optimizer: Optimizer = "sgd"
    steps: int = 300
    step_size: float = 0.1

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
        flow = problem.ball.origin()
        best, objective = self._objective(problem)
        for step in range(self.steps if len(flow) else 0):
            flow.requires_grad_()
            with torch.enable_grad():
                value = objective(flow).sum()
            (gradient,) = torch.autograd.grad(value, flow)
            flow = flow.detach().sub_(gradient, alpha=self.step_size * (1 - step / self.steps))
        with torch.no_grad():
            objective(flow)
        return best

    def _lbfgs(self, problem: Problem) -> _Best:
        flow = problem.ball.origin().requires_grad_()
        best, objective = self._objective(problem)
        optimizer = torch.optim.LBFGS([flow], max_iter=self.steps, tolerance_change=0.0, line_search_fn="strong_wolfe")

        def closure() -> float:
            with torch.enable_grad():
                value = objective(flow).sum()
            (flow.grad,) = torch.autograd.grad(value, flow)
            return float(value)

        optimizer.step(closure)  # looks at every flow that it tries
        return best

    def _objective(self, problem: Problem) -> tuple[_Best, Callable[[Tensor], Tensor]]:
        """Returns a place for the best flows, and the objective, (N, 2, H, W) to (N,), which looks at each flow."""
        best = _Best.nothing(problem.ball.origin())
        sides = pixels_per_unit(self.unit, *best.flow.shape[2:])
        # nothing moves along an axis of one pixel, whose unit is 0
        scale = best.flow.new_tensor([1 / side if side else 0.0 for side in sides]).view(2, 1, 1)

        def objective(flow: Tensor) -> Tensor:
            logits = problem.target.logits(problem.ball.decode(flow))
            ahead, sure = lead(logits, problem.labels, problem.targeted)
            roughness = flow_smoothness(flow * scale, self.neighbours)
            best.look(flow.detach(), ahead.detach(), roughness.detach(), sure)
            return self.tau * roughness - ahead.clamp(max=self.kappa)

        return best, objective


@dataclass
class _Best:
    """The best flow of each sample so far: the smoothest of those that break it, else the one that comes nearest.

    Attributes:
        flow: (N, 2, H, W).
        lead: (N,) as `robplug_flow.attack.lead` has it.
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

"""The attack on scores alone: an evolution strategy over flows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from robplug.attacks import radius
from robplug.errors import InputError, ThreatError
from robplug.loop import Problem, lead
from robplug.rng import Rng
from robplug.targets import Target
from robplug.types import Perturbed, ThreatModel
from robplug_flow.attack import flow_problem
from robplug_flow.kernels.ops import flow_smoothness
from robplug_flow.norm import FlowBall
from robplug_flow.units import to_normalized

MOMENTUM = 0.9


@dataclass(frozen=True)
class GradientFree:
    """Climbs the lead of a wrong class by an evolution strategy; the target is asked for scores only.

    A generation is a population of flows around the current one, in antithetic pairs v + d and v - d with normal d,
    clamped to the budget. The mean of d weighted by the pairs' differences in fitness estimates the gradient; its
    running mean gives the signs of the step, which shrinks linearly to 0. A member that breaks its sample ends that
    sample's search. All members of all samples are one batch.

    Convention: a flow in pixels, (row, column); shares of eps are in the norm's unit.
    Source: flow-gradient paper, section 5.2; Rechenberg 1978 for evolution strategies. The paper says no more.
    Differs: eps bounds the flow, where the paper balances its size by c = 10 alone; with a radius that is never
        reached and ``tau=0.1`` (1/c, as in `robplug_flow.stadv.StAdv`) the balance is all there is.

    Attributes:
        queries: scores that may be asked for per sample.
        population: members of a generation, even.
        sigma: standard deviation of d, as a share of eps.
        step_size: first step, as a share of eps.
        tau: weight of the flow loss (normalised units, adjacent neighbours) in the fitness.
    """

    queries: int = 2000
    population: int = 20
    sigma: float = 0.5
    step_size: float = 0.1
    tau: float = 0.0

    def __post_init__(self) -> None:
        if self.population < 2 or self.population % 2:
            raise InputError("an even population >= 2", self.population)
        if self.queries <= self.population:
            raise InputError("queries for one generation and one look", self.queries, f"give > {self.population}")
        for name in ("sigma", "step_size"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"a finite {name} > 0", getattr(self, name))
        if not 0 <= self.tau < float("inf"):
            raise InputError("a finite tau >= 0", self.tau)

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
        """Attacks images (N, C, H, W); the witness is the flow in pixels, (row, column)."""
        if target.offers == "labels":
            raise ThreatError("flow/gradient-free: expected a target with scores, got one with labels")
        eps = radius(threat)
        problem = flow_problem(target, x, y, threat, rng, y_goal, gradients=False)
        flow = problem.ball.origin()
        trend = torch.zeros_like(flow)
        broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        generations = (self.queries - 1) // self.population
        left = problem
        for generation in range(generations if len(x) else 0):
            rows = (~broken).nonzero().flatten()
            member, slope, hit = self._generation(left, flow[rows], eps)
            trend[rows] = MOMENTUM * trend[rows] + slope
            step = self.step_size * eps * (1 - generation / generations)
            moved = left.ball.project(flow[rows] + step * left.ball.steepest(trend[rows], flow[rows]))
            flow[rows] = torch.where(hit.view(-1, 1, 1, 1), member, moved)
            if bool(hit.any()):
                broken[rows] = hit
                left = left.select(~hit)
            if bool(broken.all()):
                break
        standing = ~broken
        if bool(standing.any()):
            # the query that is left: the flow of the last step was no member
            broken[standing] = left.broken(left.target.logits(left.ball.decode(flow[standing])))
        return Perturbed(problem.ball.decode(flow), flow, broken)

    def _generation(self, problem: Problem, flow: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """Returns each sample's best member, the estimated slope (mean size 1), and whether the member breaks it."""
        ball, pairs = cast(FlowBall, problem.ball), self.population // 2
        noise = problem.rng.normal((pairs, *flow.shape[1:]), like=flow)
        move = noise * (self.sigma * eps) * ball.unit
        members = ball.project(torch.cat([flow[:, None] + move, flow[:, None] - move], dim=1))
        crowd = replace(ball, x=ball.x.repeat_interleave(self.population, dim=0))
        logits = problem.target.logits(crowd.decode(members.flatten(0, 1)))
        if bool(logits.isnan().any()):
            raise ThreatError("flow/gradient-free: expected scores that are numbers, got nan")
        labels = problem.labels.repeat_interleave(self.population)
        ahead, sure = lead(logits, labels, problem.targeted)
        fitness = ahead
        if self.tau:
            fitness = ahead - self.tau * flow_smoothness(to_normalized(members.flatten(0, 1)))
        one, other = fitness.view(-1, 2, pairs, 1, 1, 1).unbind(1)
        slope = ((one - other) * noise).mean(1)
        size = slope.abs().flatten(1).mean(1).clamp_min_(torch.finfo(slope.dtype).tiny)
        safety, best = (ahead - sure).view(-1, self.population).max(1)
        member = members[torch.arange(len(flow), device=flow.device), best]
        return member, slope / size.view(-1, 1, 1, 1), safety > 0

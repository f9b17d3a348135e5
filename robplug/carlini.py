"""Carlini and Wagner's attack in l2: the one search of every attack that is a form of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robplug import canonical
from robplug.attacks import make_problem
from robplug.errors import InputError, ThreatError
from robplug.loop import Problem, Transform, lead
from robplug.norms import L2Ball
from robplug.rng import Rng
from robplug.targets import Target, settled
from robplug.types import Perturbed, ThreatModel

INSIDE = 1 - 1e-6
"""Share of the bounds' width in which a start lies, so that its inverse tanh is finite."""
PROGRESS = 0.9999
"""What a loss must fall below in a tenth of the steps, as a share of what it was, for the sample to go on."""


@dataclass(frozen=True)
class CarliniWagner:
    """Minimises |delta|^2 + c * max(confidence - lead, 0) for the nearest sample that is sure to be adversarial.

    The lead is the largest other logit minus the label's, or for a goal the goal's minus the largest other. delta is
    measured in widths of the bounds, x_adv moves as a tanh, Adam takes all steps for each c, and a binary search over c
    follows. Of all iterates of all starts the nearest is returned whose lead reaches the confidence; where none does,
    that of the largest lead. Transforms are seen by the gradient alone: what counts is the lead on x_adv itself.

    Source: Carlini and Wagner 2017, section VI.A, with the constants' search and the early end of their code.
    Differs: their code, and Foolbox's, ends for the whole batch when the sum of the losses stalls; here each sample
        leaves on its own account, so that it does not depend on its neighbours.

    Attributes:
        steps: of Adam for each constant.
        step_size: learning rate of Adam, in the space of the inverse tanh.
        confidence: lead in logits that is aimed at.
        binary_search_steps: number of constants c.
        initial_const: first c; without success it grows tenfold.
        abort_early: a sample is done with a c when in a tenth of the steps neither its least loss nor its mean loss has
            fallen by 0.01 %; off, all steps are taken.
        restarts: number of starts. The first is the sample itself, so that more of them never find a larger distance.
        start_radius: l2 length, in units of the data, of the random changes that the other starts make; each is then
            clipped to the bounds, and so may be shorter.
        transform: applied to the images before each gradient, such as input diversity: a function of the images and of
            a `robplug.rng.Rng`, a stream per sample. Plans cannot name one.
        draws: number of transforms whose gradients are averaged in a step.
    """

    steps: int = 100
    step_size: float = 0.01
    confidence: float = 0.0
    binary_search_steps: int = 5
    initial_const: float = 0.01
    abort_early: bool = True
    restarts: int = 1
    start_radius: float = 1.0
    transform: Transform | None = None
    draws: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "binary_search_steps", "restarts", "draws"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} >= 1", getattr(self, name))
        for name in ("step_size", "initial_const", "start_radius"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"a finite {name} > 0", getattr(self, name))
        if not 0 <= self.confidence < float("inf"):
            raise InputError("a finite confidence >= 0", self.confidence)
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
        """Attacks a batch under an l2 threat without eps; see `robplug.types.Attack.run`.

        Raises:
            InputError: a tensor does not fit.
            ThreatError: the norm is not l2, there is an eps, or the target has no gradients.
        """
        check_minimal(threat, "robplug/pgd")
        return self.search(make_problem(target, x, y, threat, rng, y_goal))

    def search(self, problem: Problem) -> Perturbed:
        """Attacks a problem of l2; the claim says which samples were seen to be adversarial.

        Raises:
            ThreatError: the target has no gradients, or one that is not finite.
        """
        if problem.target.offers != "gradients":
            raise ThreatError(f"expected a target with gradients, got one with {problem.target.offers}")
        x = problem.ball.origin()
        best = _Best(x)
        if len(x):
            with settled(problem.target.module):
                for restart in range(self.restarts):
                    part = replace(problem, rng=problem.rng.at_restart(restart))
                    start = x if restart == 0 else self._random_start(x, part)
                    self._search_constants(part, _inverse(start, problem.target.bounds), best)
        return Perturbed(best.x_adv, None, best.lead > 0)

    def _random_start(self, x: Tensor, problem: Problem) -> Tensor:
        ball = L2Ball(x, self.start_radius, problem.target.bounds)
        direction = ball.steepest(problem.rng.normal(x.shape[1:], like=x), x)
        return (x + self.start_radius * direction).clamp_(*ball.bounds)

    def _search_constants(self, problem: Problem, start: Tensor, best: _Best) -> None:
        const = start.new_full((len(start),), self.initial_const)
        lower, upper = torch.zeros_like(const), torch.full_like(const, torch.inf)
        for _ in range(self.binary_search_steps):
            reached = self._descend(_Moving(problem, start, const, self.step_size), best)
            lower, upper = torch.where(reached, lower, const), torch.where(reached, const, upper)
            const = torch.where(upper.isinf(), 10 * const, (lower + upper) / 2)

    def _descend(self, moving: _Moving, best: _Best) -> Tensor:
        """Takes all steps for one constant per sample; returns (N,) whether an iterate reached the confidence."""
        reached = torch.zeros_like(best.lead, dtype=torch.bool)
        a_tenth = math.ceil(self.steps / 10)
        for step in range(self.steps):
            iterate, loss, gradient = self._gradient(moving)
            reached[moving.rows] |= best.look(moving.rows, iterate, self.confidence)
            moving.step(gradient, loss)
            if self.abort_early and (step + 1) % a_tenth == 0 and not moving.drop_stalled():
                break
        return reached

    def _gradient(self, moving: _Moving) -> tuple[_Iterate, Tensor, Tensor]:
        """Returns the images of now, and (N,) losses and the gradient by w, both averaged over draws."""
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        for _ in range(self.draws):
            with torch.enable_grad():
                x_adv = moving.images()
                seen = x_adv if self.transform is None else self.transform(x_adv, moving.problem.rng)
                ahead, sure = moving.leads(seen)
                size = (x_adv - moving.x).div(moving.width).flatten(1).square().sum(1)
                loss = size + moving.const * (self.confidence - ahead).clamp_min(0.0)
            gradients += torch.autograd.grad(loss.sum(), moving.w)
            losses.append(loss.detach())
            if not bool(gradients[-1].isfinite().all()):
                raise ThreatError("expected a finite gradient of the target, got nan or inf; use an attack on scores")
        if seen is not x_adv:  # a transformed image says nothing about the image itself
            with torch.no_grad():
                ahead, sure = moving.leads(x_adv)
        iterate = _Iterate(x_adv.detach(), ahead.detach(), sure, size.detach())
        return iterate, _mean(losses), _mean(gradients)


class _Iterate(NamedTuple):
    """Images (N, ...), and (N,) their leads, the leads that no rounding takes away, and their squared distances."""

    x_adv: Tensor
    lead: Tensor
    sure: Tensor
    size: Tensor


class _Moving:
    """The samples that still move for their constants c: images as tanh of a free variable w, which Adam moves.

    Attributes:
        problem: the model, and labels and streams of these samples.
        rows: (M,) which samples of the batch they are.
        x: (M, ...) where they came from.
        const: (M,) their c.
        w: (M, ...) the variable.
        width: of the bounds.
    """

    def __init__(self, problem: Problem, start: Tensor, const: Tensor, step_size: float) -> None:
        self.problem, self.x, self.const = problem, problem.ball.origin(), const
        self.rows = torch.arange(len(start), device=start.device)
        self._bounds = problem.target.bounds
        self.width = self._bounds[1] - self._bounds[0]
        self.w = start.clone().requires_grad_()
        self._adam = torch.optim.Adam([self.w], lr=step_size)
        self._least, self._total = torch.full_like(const, torch.inf), torch.zeros_like(const)
        self._before = self._least, self._least

    def images(self) -> Tensor:
        """Returns the images of w; differentiable."""
        low, high = self._bounds
        return (low + self.width * (self.w.tanh() + 1) / 2).clamp(low, high)

    def leads(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (M,) by how much the attack is ahead, and (M,) the lead that no rounding takes away."""
        return lead(self.problem.target.logits(images), self.problem.labels, self.problem.targeted)

    def step(self, gradient: Tensor, loss: Tensor) -> None:
        """Moves w; ``loss``, (M,), is that of before."""
        self.w.grad = gradient
        self._adam.step()
        self._least, self._total = torch.minimum(self._least, loss), self._total + loss

    def drop_stalled(self) -> bool:
        """Drops samples that have made no progress since the last call, as long ago as the one before it.

        Progress is a new least loss, or a smaller mean: a large step size soon finds the first by chance, and Adam
        settles later. Returns whether any sample is left.
        """
        least, total = self._before
        going = (self._least < PROGRESS * least) | (self._total < PROGRESS * total)
        if not bool(going.all()):
            self._keep(going)
        self._before = self._least, self._total
        self._total = torch.zeros_like(self._total)
        return len(self.rows) > 0

    def _keep(self, going: Tensor) -> None:
        self.problem = self.problem.select(going)
        self.rows, self.x, self.const = self.rows[going], self.x[going], self.const[going]
        self._least, self._total = self._least[going], self._total[going]
        averages, step_size = self._adam.state[self.w], self._adam.defaults["lr"]
        self.w = self.w.detach()[going].requires_grad_()
        self._adam = torch.optim.Adam([self.w], lr=step_size)
        self._adam.state[self.w] = {k: v if k == "step" else v[going] for k, v in averages.items()}


class _Best:
    """The best images so far: the nearest that reach the confidence, else those of the largest lead.

    Attributes:
        x_adv: (N, ...) the images.
        lead: (N,) theirs.
    """

    def __init__(self, x: Tensor) -> None:
        self.x_adv = x.clone()
        self.lead = x.new_full((len(x),), -torch.inf)
        self._size = torch.full_like(self.lead, torch.inf)

    def look(self, rows: Tensor, iterate: _Iterate, confidence: float) -> Tensor:
        """Keeps what is better of some rows, (M,); returns (M,) whether they reach the confidence."""
        reaches = iterate.lead > iterate.sure.clamp_min(confidence)
        least = self._size[rows]
        nearer = reaches & (iterate.size < least)
        better = nearer | (least.isinf() & ~reaches & (iterate.lead > self.lead[rows]))
        self._size[rows[nearer]] = iterate.size[nearer]
        self.lead[rows[better]] = iterate.lead[better]
        self.x_adv[rows[better]] = iterate.x_adv[better]
        return reaches


def check_minimal(threat: ThreatModel, instead: str) -> None:
    """Refuses a threat other than the smallest l2 distance.

    Args:
        threat: what is asked for.
        instead: name of an attack that keeps a radius.

    Raises:
        ThreatError: the norm is not l2, or there is an eps.
    """
    if threat.norm != "l2" or threat.eps is not None:
        got = f"{threat.norm} with eps={threat.eps}"
        raise ThreatError(f"expected a threat with norm l2 and eps=None, got {got}; {instead} keeps a radius")


def harmonised(settings: canonical.CW, threat: ThreatModel) -> dict[str, Any]:
    """Canonical parameters in those of `CarliniWagner`: all steps, and a constant for distances in widths."""
    width = threat.bounds[1] - threat.bounds[0]
    return {**vars(settings), "initial_const": settings.initial_const / width**2, "abort_early": False}


def _inverse(x: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Returns the variable whose images are x."""
    low, high = bounds
    return ((2 * (x - low) / (high - low) - 1) * INSIDE).atanh()


def _mean(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).mean(0)

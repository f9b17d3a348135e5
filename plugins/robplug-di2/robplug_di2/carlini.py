"""D-C&W: Carlini and Wagner's l2 attack with diverse inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robplug.attacks import make_problem
from robplug.errors import InputError, ThreatError
from robplug.loop import Problem, lead
from robplug.rng import Rng
from robplug.targets import Target, settled
from robplug.types import Perturbed, ThreatModel
from robplug_di2.diversity import InputDiversity

INSIDE = 1 - 1e-6
"""Share of the bounds' width in which a start lies, so that its inverse tanh is finite."""


@dataclass(frozen=True)
class DiverseCarliniWagner(InputDiversity):
    """D-C&W: minimises |delta|^2 + c * max(confidence - lead, 0), where the lead is seen on diverse inputs.

    The lead is the largest other logit minus the label's, or for a goal the goal's minus the largest other. delta is
    measured in widths of the bounds, x_adv moves as a tanh, Adam takes all steps for each c, and a binary search over c
    follows. Of all iterates the nearest is returned whose lead on the image itself, not on a diverse one, reaches the
    confidence; where none does, that of the largest lead.

    Source: Xie et al. 2019, table 3.2 of the first author's dissertation; Carlini and Wagner 2017, section VI.A, with
        the constants' search of their code.
    Differs: the paper's experiment has ``confidence=10``; that is no search for the smallest distance, which is what
        a threat without eps asks for. With p = 0 it is C&W itself.

    Attributes:
        steps: of Adam for each constant.
        step_size: learning rate of Adam.
        confidence: lead in logits that is aimed at.
        binary_search_steps: number of constants c.
        initial_const: first c; without success it grows tenfold.
    """

    steps: int = 250
    step_size: float = 0.01
    confidence: float = 0.0
    binary_search_steps: int = 5
    initial_const: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "binary_search_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} >= 1", getattr(self, name))
        for name in ("step_size", "initial_const"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"a finite {name} > 0", getattr(self, name))
        if not 0 <= self.confidence < float("inf"):
            raise InputError("a finite confidence >= 0", self.confidence)

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
        """Attacks images (N, C, H, W), or with p = 0 samples of any shape, under an l2 threat without eps.

        Raises:
            InputError: a tensor does not fit, or the model takes no images of the padded size.
            ThreatError: the norm is not l2, there is an eps, or the target has no gradients.
        """
        if threat.norm != "l2" or threat.eps is not None:
            got = f"{threat.norm} with eps={threat.eps}"
            raise ThreatError(f"expected a threat with norm l2 and eps=None, got {got}; di2/m-di2-fgsm keeps a radius")
        if target.offers != "gradients":
            raise ThreatError(f"expected a target with gradients, got one with {target.offers}")
        problem = make_problem(target, x, y, threat, rng, y_goal)
        search = _Search(problem, x.detach(), self.confidence)
        if len(x):
            with self.explaining(target, x), settled(target.module):
                self._search_constants(search)
        return Perturbed(search.best, None, search.lead > 0)

    def _search_constants(self, search: _Search) -> None:
        count = len(search.x)
        const = search.x.new_full((count,), self.initial_const)
        lower, upper = torch.zeros_like(const), torch.full_like(const, torch.inf)
        for _ in range(self.binary_search_steps):
            reached = self._descend(search, const)
            lower, upper = torch.where(reached, lower, const), torch.where(reached, const, upper)
            const = torch.where(upper.isinf(), 10 * const, (lower + upper) / 2)

    def _descend(self, search: _Search, const: Tensor) -> Tensor:
        """Takes all steps for one constant per sample; returns (N,) whether an iterate reached the confidence."""
        w = search.start().requires_grad_()
        adam = torch.optim.Adam([w], lr=self.step_size)
        reached = torch.zeros(len(w), dtype=torch.bool, device=w.device)
        for _ in range(self.steps):
            with torch.enable_grad():
                x_adv = search.image(w)
                seen = self(x_adv, search.problem.rng, search.problem.target.bounds)
                lead, sure = search.leads(seen)
                size = (x_adv - search.x).div(search.width).flatten(1).square().sum(1)
                loss = size + const * (self.confidence - lead).clamp_min(0.0)
            (w.grad,) = torch.autograd.grad(loss.sum(), w)
            if not bool(w.grad.isfinite().all()):
                raise ThreatError("expected a finite gradient of the target, got nan or inf; use an attack on scores")
            if seen is not x_adv:  # a diverse input says nothing about the image itself
                with torch.no_grad():
                    lead, sure = search.leads(x_adv)
            reached |= search.look(x_adv.detach(), lead.detach(), sure, size.detach())
            adam.step()
        return reached


class _Search:
    """Images as tanh of a free variable, and the best of those that were looked at.

    Attributes:
        problem: the model and its labels.
        x: (N, ...) samples.
        best: (N, ...) best images so far: the nearest that reach the confidence, else those of the largest lead.
        lead: (N,) of the best.
        width: of the bounds.
    """

    def __init__(self, problem: Problem, x: Tensor, confidence: float) -> None:
        self.problem, self.x, self._confidence = problem, x, confidence
        self._low, self._high = problem.target.bounds
        self.width = self._high - self._low
        self.best = x.clone()
        self.lead = x.new_full((len(x),), -torch.inf)
        self._size = torch.full_like(self.lead, torch.inf)

    def start(self) -> Tensor:
        """Returns the variable of the clean samples."""
        return ((2 * (self.x - self._low) / self.width - 1) * INSIDE).atanh()

    def image(self, w: Tensor) -> Tensor:
        """Returns the images of a variable; differentiable."""
        return (self._low + self.width * (w.tanh() + 1) / 2).clamp(self._low, self._high)

    def leads(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (N,) by how much the attack is ahead, and (N,) the lead that no rounding takes away."""
        return lead(self.problem.target.logits(images), self.problem.labels, self.problem.targeted)

    def look(self, images: Tensor, lead: Tensor, sure: Tensor, size: Tensor) -> Tensor:
        """Keeps what is better; returns (N,) whether the images reach the confidence."""
        reaches = lead > sure.clamp_min(self._confidence)
        nearer = reaches & (size < self._size)
        better = nearer | (self._size.isinf() & ~reaches & (lead > self.lead))
        self._size = torch.where(nearer, size, self._size)
        self.lead = torch.where(better, lead, self.lead)
        self.best = torch.where(better.view(-1, *[1] * (images.dim() - 1)), images, self.best)
        return reaches

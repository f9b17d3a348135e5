"""The one loop of every iterative gradient attack.

All steps of the host's and the plugins' gradient attacks happen here: start, input transforms, gradient, momentum,
step, projection, restarts. A norm's `Ball` says how to move; nothing leaves the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from robplug.data import IGNORE
from robplug.errors import InputError, ThreatError
from robplug.norms import Ball
from robplug.rng import Rng
from robplug.targets import Target, settled
from robplug.tasks import task_of
from robplug.types import Perturbed

Loss = Callable[[Tensor, Tensor], Tensor]
Transform = Callable[[Tensor, Rng], Tensor]

ROUNDING = 2.0**-16
"""A lead below this share of the largest logit may be lost where another batch size adds in another order."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the (N,) cross-entropies; an attack raises it (lowers it towards a goal).

    Of a segmentation network's logits it is the sum over the labelled pixels.
    """
    if logits.dim() > 2:
        return F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE).flatten(1).sum(1)
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns (N,) the largest other logit minus the label's own: positive where another class wins."""
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.amax(1) - own[:, 0]


def lead(logits: Tensor, labels: Tensor, targeted: bool) -> tuple[Tensor, Tensor]:
    """Returns (N,) by how much the attack is ahead in logits, and (N,) the lead from which on that is sure.

    Untargeted, it is the largest other logit minus the label's; targeted, the goal's minus the largest other.
    """
    ahead = margin(logits, labels)
    return -ahead if targeted else ahead, ROUNDING * logits.detach().abs().amax(1)


@dataclass(frozen=True)
class Steps:
    """How `ascend` moves.

    Attributes:
        steps: number of gradient steps, at least 1.
        step_size: length of a step in the norm of the ball.
        momentum: share mu of the accumulated gradient that is kept; each gradient enters scaled to mean absolute
            value 1 (Dong et al. 2018, eq. 6, up to a constant factor that no unit step sees).
        random_start: start at a random point of the ball.
        restarts: number of starts, at least 1; more than one implies looking at the result of each.
        early_stop: a sample that is broken leaves the batch with the iterate that broke it.
        loss: (logits, labels) to (N,).
        transform: applied to the images before each gradient (input diversity and the like), with streams of its own.
        draws: number of transforms whose gradients are averaged in a step.
    """

    steps: int
    step_size: float
    momentum: float = 0.0
    random_start: bool = False
    restarts: int = 1
    early_stop: bool = True
    loss: Loss = cross_entropy
    transform: Transform | None = None
    draws: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "restarts", "draws"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} >= 1", getattr(self, name))
        if not self.step_size >= 0:
            raise InputError("step_size >= 0", self.step_size)


@dataclass(frozen=True)
class Problem:
    """One batch to be attacked.

    Attributes:
        target: the model.
        labels: (N,) the classes to leave, or to reach if ``targeted``; of other tasks their labels.
        ball: where the samples may go.
        rng: a stream per sample.
        targeted: whether the labels are goals.
    """

    target: Target
    labels: Tensor
    ball: Ball
    rng: Rng
    targeted: bool = False

    def loss(self, x: Tensor, loss: Loss) -> tuple[Tensor, Tensor | None]:
        """Returns (N,) the loss to be raised and the logits; of a detector the loss of its training, and no logits."""
        if self.target.task == "detection":
            return self.target.losses(x, self.labels), None
        logits = self.target.logits(x)
        return loss(logits, self.labels), logits

    def broken(self, logits: Tensor) -> Tensor:
        """Returns (N,) bool: the attack has what it wants."""
        return self._reached(logits.argmax(1)) == self.targeted

    def beaten(self, x: Tensor) -> Tensor:
        """Returns (N,) bool: the attack has what it wants of these images; a forward pass."""
        if self.target.task == "detection":
            return ~self._reached(self.target.detections(x))
        return self.broken(self.target.logits(x))

    def _reached(self, answer: Tensor) -> Tensor:
        if self.target.task == "classification":
            return answer == self.labels
        task = task_of(self.target)
        return task.code(answer, self.labels) == task.wanted(self.labels)

    def select(self, keep: Tensor) -> Problem:
        """Returns the problem of some of the samples."""
        return replace(self, labels=self.labels[keep], ball=self.ball.select(keep), rng=self.rng.select(keep))


def ascend(problem: Problem, how: Steps) -> Perturbed:
    """Runs a gradient attack.

    With ``early_stop``, or with several restarts, each result is looked at again, and the claim says what was seen.
    Without, the last iterate is returned unseen, as the textbook form of PGD does, and there is no claim.

    Raises:
        ThreatError: the target offers no gradients.
    """
    if problem.target.offers != "gradients":
        raise ThreatError(f"expected a target with gradients, got one with {problem.target.offers}; use another attack")
    origin = problem.ball.origin()
    if len(origin) == 0:
        return Perturbed(problem.ball.decode(origin), problem.ball.witness(origin))
    look = how.early_stop or how.restarts > 1
    best = origin
    broken = torch.zeros(len(origin), dtype=torch.bool, device=origin.device)
    for restart in range(how.restarts):
        left = ~broken if look else torch.ones_like(broken)
        part = replace(problem, rng=problem.rng.at_restart(restart)).select(left)
        with settled(problem.target.module):
            z, success = _one_start(part, how, look)
        best = best.masked_scatter(left.view(-1, *[1] * (best.dim() - 1)), z)
        broken = broken.masked_scatter(left, success)
        if look and bool(broken.all()):
            break
    with torch.no_grad():
        return Perturbed(problem.ball.decode(best), problem.ball.witness(best), broken if look else None)


def _one_start(problem: Problem, how: Steps, look: bool) -> tuple[Tensor, Tensor]:
    """Attacks from one start; returns z and whether it was seen to break its sample."""
    z = problem.ball.random(problem.rng) if how.random_start else problem.ball.origin()
    result = z.clone()
    index = torch.arange(len(z), device=z.device)
    success = torch.zeros(len(z), dtype=torch.bool, device=z.device)
    velocity: Tensor | None = None
    # a transformed image says nothing about the image itself, so nobody leaves on its account
    may_leave = how.early_stop and how.transform is None
    for _ in range(how.steps):
        gradient, logits = _gradient(problem, z, how)
        if may_leave and logits is not None and bool((done := problem.broken(logits)).any()):
            leaving = done.nonzero().flatten()
            result[index[leaving]], success[index[leaving]] = z[leaving], True
            if len(leaving) == len(z):
                return result, success
            staying = (~done).nonzero().flatten()
            problem, index, z, gradient = problem.select(~done), index[staying], z[staying], gradient[staying]
            velocity = None if velocity is None else velocity[staying]
        if how.momentum:
            gradient = gradient / _mean_abs(gradient)
            velocity = gradient if velocity is None else velocity.mul_(how.momentum).add_(gradient)
            gradient = velocity
        z = problem.ball.project(torch.add(z, problem.ball.steepest(gradient, z), alpha=how.step_size))
    result[index] = z
    if look:
        with torch.no_grad():
            success[index] = problem.beaten(problem.ball.decode(z))
    return result, success


def _gradient(problem: Problem, z: Tensor, how: Steps) -> tuple[Tensor, Tensor | None]:
    """Returns the gradient that is to be climbed, averaged over draws, and the last logits, if there are any."""
    z = z.detach().requires_grad_()
    total: Tensor | None = None
    for _ in range(how.draws):
        with torch.enable_grad():
            x = problem.ball.decode(z)
            loss, logits = problem.loss(x if how.transform is None else how.transform(x, problem.rng), how.loss)
        upwards = torch.full_like(loss, -1.0 if problem.targeted else 1.0)
        (gradient,) = torch.autograd.grad(loss, z, upwards)
        # the sum is finite only if all values are; where it overflows, each is asked
        if not math.isfinite(gradient.sum()) and not bool(gradient.isfinite().all()):
            raise ThreatError("expected a finite gradient of the target, got nan or inf; use an attack on scores")
        total = gradient if total is None else total.add_(gradient)
    assert total is not None  # draws >= 1
    return total if how.draws == 1 else total.div_(how.draws), None if logits is None else logits.detach()


def _mean_abs(gradient: Tensor) -> Tensor:
    size = gradient.flatten(1).abs().mean(1).clamp_min_(torch.finfo(gradient.dtype).tiny)
    return size.view(-1, *[1] * (gradient.dim() - 1))

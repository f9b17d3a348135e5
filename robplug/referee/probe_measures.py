"""What is measured of a model on some samples, for the diagnostics. Each measure gives columns, a value a sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robplug.errors import RobplugError
from robplug.loop import ROUNDING, Loss, Problem, Steps, ascend, cross_entropy, margin
from robplug.norms import LINF, Ball, Norm
from robplug.referee.rules_probes import STEPS
from robplug.rng import Rng
from robplug.targets import Target

Columns = dict[str, Tensor]
DIFFERENCE = 1e-3
"""Length in linf of a finite difference, in shares of the range: far above float32's rounding, below a grey level."""
DIRECTIONS = 3
NOISE_DRAWS = 20
UNBOUNDED_STEPS = 40
AVERAGED = 8
"""Times that many draws as the plan's are averaged on a stochastic target."""


class NotMeasurableError(RobplugError):
    """A measure that a target does not allow; the message says why."""


@dataclass(frozen=True)
class Part:
    """Some samples that the target classifies correctly.

    Attributes:
        target: the model.
        x: samples.
        y: (N,) their classes.
        rng: a stream per sample.
        norm: of the threat.
        eps: its radius.
    """

    target: Target
    x: Tensor
    y: Tensor
    rng: Rng
    norm: Norm
    eps: float

    @property
    def range(self) -> float:
        """Largest minus smallest value of a sample."""
        return self.target.bounds[1] - self.target.bounds[0]

    @property
    def ball(self) -> Ball:
        """The points that the threat allows."""
        return self.norm.ball(self.x, self.eps, self.target.bounds)

    def gradient(self, loss: Loss) -> Tensor:
        """Returns the (N, D) gradients of a loss.

        Raises:
            NotMeasurableError: the target offers none.
        """
        if self.target.offers != "gradients":
            raise NotMeasurableError(f"the target offers {self.target.offers} and no gradients")
        x = self.x.clone().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss(self.target.logits(x), self.y).sum(), x)
        return gradient.flatten(1)

    def climb(self, ball: Ball, how: Steps, target: Target | None = None) -> Tensor:
        """Returns what a gradient attack finds, from the same starts each time."""
        rng = Rng(self.rng.seed, self.rng.ids)
        return ascend(Problem(target or self.target, self.y, ball, rng), how).x_adv

    def judged(self, x: Tensor) -> Columns:
        """Returns whether the model gives another class, and whether it gives no number."""
        prediction = self.target.predict(x)
        return {"broken": (prediction != self.y) & (prediction >= 0), "infinite": prediction < 0}


@torch.no_grad()
def repeat(part: Part) -> Columns:
    """Calls the model twice on one batch: other logits (beyond rounding), other classes, no finite ones."""
    first, second = part.target.logits(part.x.clone()), part.target.logits(part.x.clone())
    equal = torch.isclose(
        first, second, rtol=ROUNDING, atol=ROUNDING * float(first.nan_to_num().abs().amax()), equal_nan=True
    )
    infinite = ~(first.isfinite() & second.isfinite()).all(1)
    return {"differs": ~equal.all(1), "changes": first.argmax(1) != second.argmax(1), "infinite": infinite}


def gradients(part: Part) -> Columns:
    """Looks at the gradients of margin and cross-entropy at the samples."""
    own, other = part.gradient(margin), part.gradient(cross_entropy)
    finite = own.isfinite().all(1)
    zero = (own == 0).all(1)
    tiny = torch.finfo(own.dtype).tiny
    return {
        "infinite": ~finite,
        "zero": zero,
        "constant": _shared_with_another_class(own, part.y) & finite & ~zero,
        "underflow": (other.abs().amax(1) < tiny) & (own.abs().amax(1) >= tiny),
    }


def _shared_with_another_class(gradient: Tensor, y: Tensor) -> Tensor:
    same = torch.stack([(gradient == row).all(1) for row in gradient])  # all pairs at once may not fit into memory
    return (same & (y[:, None] != y[None])).any(1)


def differences(part: Part) -> Columns:
    """Compares what the gradient says of small steps with what the model does."""
    if any(hasattr(module, "backward_approximation") for module in part.target.module.modules()):
        raise NotMeasurableError("the gradient is declared to be that of a substitute (backward =)")
    if part.target.dtype != part.x.dtype:
        raise NotMeasurableError(f"{part.target.dtype} is too coarse for finite differences")
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):  # as coarse, by default
        return _differences(part)


def _differences(part: Part) -> Columns:
    x, (low, high) = part.x, part.target.bounds
    with torch.no_grad():
        rival = part.target.logits(x).scatter(1, part.y[:, None], -torch.inf).argmax(1)

    def ahead(logits: Tensor, y: Tensor) -> Tensor:  # the margin to one class, which has no kink at a change of rivals
        return (logits.gather(1, rival[:, None]) - logits.gather(1, y[:, None]))[:, 0]

    gradient = part.gradient(ahead)
    drawn = [part.rng.at_restart(2 + i).uniform(x.shape[1:], -1.0, 1.0, like=x).sign() for i in range(DIRECTIONS)]
    apart, size = (torch.zeros(len(x), device=x.device, dtype=x.dtype) for _ in range(2))
    for direction in (gradient.view_as(x).sign(), *drawn):
        step = DIFFERENCE * part.range * direction
        up, down = (x + step).clamp(low, high), (x - step).clamp(low, high)
        with torch.no_grad():
            seen = ahead(part.target.logits(up), part.y) - ahead(part.target.logits(down), part.y)
        said = (gradient * (up - down).flatten(1)).sum(1)
        apart += (seen - said).abs()
        size += seen.abs() + said.abs()
    return {"disagreement": apart / size}


def unbounded(part: Part) -> Columns:
    """Attacks with a linf radius of half the range, whatever the threat, from the sample itself: chance has no part."""
    eps = part.range / 2
    how = Steps(steps=UNBOUNDED_STEPS, step_size=2.5 * eps / UNBOUNDED_STEPS, loss=margin)
    return part.judged(part.climb(LINF.ball(part.x, eps, part.target.bounds), how))


@torch.no_grad()
def noise(part: Part) -> Columns:
    """Draws points of the ball."""
    draws = [part.judged(part.ball.decode(part.ball.random(part.rng.at_restart(draw)))) for draw in range(NOISE_DRAWS)]
    return {name: torch.stack([draw[name] for draw in draws]).any(0) for name in draws[0]}


def steps(part: Part) -> Columns:
    """Runs PGD on the margin with more and more steps."""
    columns: Columns = {}
    for count in STEPS:
        # what breaks once on a stochastic target need not do so again
        how = Steps(
            count, 2.5 * part.eps / count, random_start=True, early_stop=not part.target.stochastic, loss=margin
        )
        x = part.climb(part.ball, how)
        columns[f"broken {count}"] = part.judged(x)["broken"]
        with torch.no_grad():
            columns[f"margin {count}"] = margin(part.target.logits(x), part.y)
    return columns


def averaging(part: Part) -> Columns:
    """Attacks a stochastic target with the plan's draws a gradient, and with several times as many."""
    if not part.target.stochastic:
        raise NotMeasurableError("the target is not declared stochastic")
    found = {}
    for name, draws in (("once", 1), ("often", AVERAGED)):
        how = Steps(20, 2.5 * part.eps / 20, random_start=True, early_stop=False, loss=margin, draws=draws)
        found[name] = part.judged(part.climb(part.ball, how, part.target.for_attack()))["broken"]
    return found


OF_MODEL: dict[str, Callable[[Part], Columns]] = {
    "repeat": repeat,
    "gradients": gradients,
    "differences": differences,
    "unbounded": unbounded,
}
OF_THREAT: dict[str, Callable[[Part], Columns]] = {"noise": noise, "steps": steps, "averaging": averaging}

"""The pixel norms linf, l2, l1 and l0, and the protocol of a norm.

A norm is a plugin point: it measures the distance between a sample and its adversarial version, and gives the
ball in which `robplug.loop` moves. What moves is a variable ``z``: the image itself for the norms here, a flow
field for a norm of flows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from robplug.errors import ThreatError
from robplug.rng import Rng


class Ball(Protocol):
    """The points that a threat allows around a batch, and how to move in them."""

    def origin(self) -> Tensor:
        """Returns the variable z of the clean samples."""
        ...

    def random(self, rng: Rng) -> Tensor:
        """Returns a random z inside."""
        ...

    def decode(self, z: Tensor) -> Tensor:
        """Returns x_adv for z; differentiable."""
        ...

    def steepest(self, gradient: Tensor, z: Tensor) -> Tensor:
        """Returns the direction of unit norm in which a linear function with this gradient rises fastest from z."""
        ...

    def project(self, z: Tensor) -> Tensor:
        """Returns the point of the ball near z, inside the data bounds; may overwrite z."""
        ...

    def witness(self, z: Tensor) -> Tensor | None:
        """Returns what `Norm.distance` needs beside x_adv."""
        ...

    def select(self, keep: Tensor) -> Ball:
        """Returns the ball of the samples where ``keep``, (N,) bool, is true."""
        ...


class Norm(Protocol):
    """How far x_adv is from x."""

    name: str

    def distance(self, x: Tensor, x_adv: Tensor, witness: Tensor | None = None) -> Tensor:
        """Returns (N,) float64; infinity where the witness does not explain x_adv."""
        ...

    def allowed(self, eps: float, values: int, bounds: tuple[float, float]) -> float:
        """Returns the largest distance that counts as inside: eps and what float32 rounding adds.

        Args:
            eps: the radius.
            values: number of values of a sample.
            bounds: of the data.
        """
        ...

    def ball(self, x: Tensor, eps: float | None, bounds: tuple[float, float]) -> Ball:
        """Returns the ball of radius eps (None: no limit) around each sample."""
        ...


@runtime_checkable
class Measuring(Norm, Protocol):
    """A norm that measures more than its distance, such as how smooth a change is; the report shows it beside."""

    def measures(self, x: Tensor, x_adv: Tensor, witness: Tensor | None = None) -> dict[str, Tensor]:
        """Returns measures by name, each (N,) float64, in the unit that the norm chooses.

        The referee calls it after `distance`, with the same tensors: the samples whose x_adv is finite. The witness is
        the attack's and may be anything, so that a measure counts only where the distance is finite; elsewhere
        the referee puts nan. The names are to be the same for every batch.

        Args:
            x: (N, ...) clean samples.
            x_adv: likewise.
            witness: what the attack showed; first axis N if it is honest.

        Raises:
            Exception: any; the rows of the batch become errors, as with `distance`. A witness that does not fit is no
                reason to raise.
        """
        ...


def _expand(per_sample: Tensor, like: Tensor) -> Tensor:
    return per_sample.view(-1, *[1] * (like.dim() - 1))


@dataclass(frozen=True)
class PixelBall:
    """What the balls of the pixel norms share: z is x_adv itself."""

    x: Tensor
    eps: float
    bounds: tuple[float, float]

    def origin(self) -> Tensor:
        return self.x.clone()

    def decode(self, z: Tensor) -> Tensor:
        return z

    def witness(self, z: Tensor) -> Tensor | None:
        return None

    def select(self, keep: Tensor) -> Ball:
        return cast(Ball, type(self)(self.x[keep], self.eps, self.bounds))

    def _inside_box(self, delta: Tensor) -> Tensor:
        """Adds delta to x and clips to the bounds; x is inside, so no norm of delta grows."""
        return delta.add_(self.x).clamp_(*self.bounds)


@dataclass(frozen=True)
class LinfBall(PixelBall):
    """The ball of the largest absolute change of a value."""

    def random(self, rng: Rng) -> Tensor:
        return self._inside_box(rng.uniform(self.x.shape[1:], -self.eps, self.eps, like=self.x))

    def steepest(self, gradient: Tensor, z: Tensor) -> Tensor:
        return gradient.sign()

    def project(self, z: Tensor) -> Tensor:
        # minimum and maximum with tensors are ball and box in one pass each
        return z.clamp_(self._lower, self._upper)

    @property
    def _lower(self) -> Tensor:
        return self._limits()[0]

    @property
    def _upper(self) -> Tensor:
        return self._limits()[1]

    def _limits(self) -> tuple[Tensor, Tensor]:
        # kept on the frozen instance: one ball serves all the steps of an attack
        limits: tuple[Tensor, Tensor] | None = self.__dict__.get("_cached")
        if limits is None:
            low, high = self.bounds
            limits = ((self.x - self.eps).clamp_(min=low), (self.x + self.eps).clamp_(max=high))
            self.__dict__["_cached"] = limits
        return limits


@dataclass(frozen=True)
class L2Ball(PixelBall):
    """The ball of the Euclidean norm of the change."""

    def random(self, rng: Rng) -> Tensor:
        direction = rng.normal(self.x.shape[1:], like=self.x)
        values = max(self.x[0].numel() if len(self.x) else 1, 1)
        radius = rng.uniform((), like=self.x).pow_(1.0 / values).mul_(self.eps)
        return self._inside_box(self.steepest(direction, self.x).mul_(_expand(radius, self.x)))

    def steepest(self, gradient: Tensor, z: Tensor) -> Tensor:
        norm = gradient.flatten(1).norm(dim=1).clamp_min_(torch.finfo(gradient.dtype).tiny)
        return gradient / _expand(norm, gradient)

    def project(self, z: Tensor) -> Tensor:
        delta = z - self.x
        norm = delta.flatten(1).norm(dim=1)
        scale = (self.eps / norm.clamp_min(torch.finfo(z.dtype).tiny)).clamp_max_(1.0)
        return self._inside_box(delta.mul_(_expand(scale, delta)))


@dataclass(frozen=True)
class L1Ball(PixelBall):
    """The ball of the sum of absolute changes.

    The steepest direction moves the largest hundredth of the gradient's values (Tramer and Boneh 2019, sparse l1
    descent), which is the one largest value below 200 values; values that stand at a bound and would leave are passed
    over.
    """

    def random(self, rng: Rng) -> Tensor:
        flat = (self.x.shape[1:].numel(),)
        parts = rng.exponential(flat, like=self.x)
        rest = rng.exponential((1,), like=self.x)
        signs = rng.uniform(flat, -1.0, 1.0, like=self.x).sign()
        delta = parts.div_(parts.sum(1, keepdim=True) + rest).mul_(signs).mul_(self.eps)
        return self._inside_box(delta.view_as(self.x))

    def steepest(self, gradient: Tensor, z: Tensor) -> Tensor:
        low, high = self.bounds
        stuck = ((z >= high) & (gradient > 0)) | ((z <= low) & (gradient < 0))
        flat = gradient.masked_fill(stuck, 0.0).flatten(1)
        count = max(1, flat.shape[1] // 100)
        _, index = flat.abs().topk(min(count, flat.shape[1]), dim=1)
        direction = torch.zeros_like(flat).scatter_(1, index, flat.gather(1, index).sign())
        return direction.div_(count).view_as(gradient)

    def project(self, z: Tensor) -> Tensor:
        delta = (z - self.x).flatten(1)
        return self._inside_box(_project_l1(delta, self.eps).view_as(z))


def _project_l1(delta: Tensor, eps: float) -> Tensor:
    """Euclidean projection of each row onto the l1 ball (Duchi et al. 2008, figure 1)."""
    size = delta.abs()
    ordered, _ = size.sort(dim=1, descending=True)
    excess = ordered.cumsum(1) - eps
    rank = torch.arange(1, size.shape[1] + 1, device=delta.device, dtype=delta.dtype)
    kept = (ordered * rank > excess).sum(1, keepdim=True).clamp_min(1)
    threshold = (excess.gather(1, kept - 1) / kept).clamp_min(0.0)
    return (size - threshold).clamp_min_(0.0).mul_(delta.sign())


@dataclass(frozen=True)
class L0Ball(PixelBall):
    """The ball of the number of changed values (a pixel of three colours counts as three)."""

    def random(self, rng: Rng) -> Tensor:
        low, high = self.bounds
        order = rng.uniform(self.x.shape[1:], like=self.x).flatten(1).argsort(dim=1).argsort(dim=1)
        values = rng.uniform(self.x.shape[1:], low, high, like=self.x)
        return torch.where(order.view_as(self.x) < int(self.eps), values, self.x)

    def steepest(self, gradient: Tensor, z: Tensor) -> Tensor:
        raise ThreatError("expected a norm with a steepest direction, got l0; use an attack that lists l0")

    def project(self, z: Tensor) -> Tensor:
        delta = (z - self.x).flatten(1)
        count = min(int(self.eps), delta.shape[1])
        _, index = delta.abs().topk(count, dim=1)
        kept = torch.zeros_like(delta).scatter_(1, index, delta.gather(1, index))
        return self._inside_box(kept.view_as(z))


@dataclass(frozen=True)
class PixelNorm:
    """An lp norm of the change x_adv - x.

    Convention: all values of a sample count alike; distances are in units of the data, measured in float64.

    Attributes:
        name: linf, l2, l1 or l0.
        p: the exponent.
        ball_type: the class of its ball.
    """

    name: str
    p: float
    ball_type: type[PixelBall]

    def distance(self, x: Tensor, x_adv: Tensor, witness: Tensor | None = None) -> Tensor:
        """Returns the (N,) distances in float64; the witness is not needed."""
        change = (x_adv.double() - x.double()).flatten(1)
        return cast(Tensor, torch.linalg.vector_norm(change, ord=self.p, dim=1))

    def allowed(self, eps: float, values: int, bounds: tuple[float, float]) -> float:
        """Returns eps and the rounding of float32 images: a relative 1e-6 and half a unit in the last place a value.

        A correct projection onto linf 1/255 is off by 7.5e-6 relative, so nothing tighter can be asked for.
        """
        if self.p == 0:
            return eps
        share = 1.0 if self.p == float("inf") else values ** (1.0 / self.p)
        return eps * (1 + 1e-6) + share * 2.0**-24 * max(abs(bounds[0]), abs(bounds[1]))

    def ball(self, x: Tensor, eps: float | None, bounds: tuple[float, float]) -> Ball:
        """Returns the ball of radius eps around each sample of x."""
        return cast(Ball, self.ball_type(x, float("inf") if eps is None else eps, bounds))


LINF = PixelNorm("linf", float("inf"), LinfBall)
L2 = PixelNorm("l2", 2.0, L2Ball)
L1 = PixelNorm("l1", 1.0, L1Ball)
L0 = PixelNorm("l0", 0.0, L0Ball)

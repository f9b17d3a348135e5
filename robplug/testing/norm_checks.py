"""The rules of a norm and its ball: each function takes a NormSpec and raises AssertionError where one is broken."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import SkipTest

import torch
from torch import Tensor

from robplug.errors import ThreatError
from robplug.norms import Ball, Norm
from robplug.registry import resolve
from robplug.rng import Rng
from robplug.testing.fixtures import WIDE
from robplug.testing.trials import radius, require
from robplug.types import NormSpec

COUNT = 6


def check_name(spec: NormSpec) -> None:
    """The norm bears the name of its Spec."""
    name = _norm(spec).name
    require(name == spec.name, f"its name is {name!r}, its Spec's {spec.name!r}")


def check_distance(spec: NormSpec) -> None:
    """Distances are (N,) float64, 0 for the sample itself and otherwise positive."""
    norm = _norm(spec)
    for x, bounds in _samples():
        ball = _ball(norm, x, _eps(spec, bounds), bounds)
        own = _distance(norm, ball, x, ball.origin())
        got = (tuple(own.shape), own.dtype)
        require(got == ((COUNT,), torch.float64), f"distances have shape and dtype {got}, expected (N,) float64")
        require((own == 0).all(), f"the distance of x to itself is {float(own.max()):.3g}, expected 0")
        moved = _distance(norm, ball, x, ball.random(_rng()))
        require((moved >= 0).all() and (moved > 0).any(), f"distances of random points are {moved.tolist()}")


def check_allowed(spec: NormSpec) -> None:
    """A radius allows itself, and at most a hundredth more: what rounding adds."""
    norm = _norm(spec)
    for x, bounds in _samples():
        eps = _eps(spec, bounds)
        allowed = norm.allowed(eps, x[0].numel(), bounds)
        require(eps <= allowed <= 1.01 * eps, f"eps {eps:.7g} allows {allowed:.7g}")


def check_origin(spec: NormSpec) -> None:
    """The clean samples are in the ball, with and without a radius."""
    norm = _norm(spec)
    for x, bounds in _samples():
        for eps in (_eps(spec, bounds), None):
            ball = _ball(norm, x, eps, bounds)
            require(torch.equal(ball.decode(ball.origin()), x), f"decode(origin()) is not x, with eps {eps}")


def check_random(spec: NormSpec) -> None:
    """Random points are inside ball and bounds."""
    for x, bounds in _samples():
        ball = _ball(_norm(spec), x, _eps(spec, bounds), bounds)
        _check_inside(spec, ball, x, bounds, ball.random(_rng()), "random(rng)")


def check_random_per_sample(spec: NormSpec) -> None:
    """A sample's random point is the same whoever its neighbours."""
    for x, bounds in _samples():
        norm, eps = _norm(spec), _eps(spec, bounds)
        together = _ball(norm, x, eps, bounds).random(_rng())
        alone = norm.ball(x[2:3], eps, bounds).random(Rng(0, [2]))
        require(torch.equal(together[2:3], alone), "a sample's random point depends on its neighbours")


def check_project(spec: NormSpec) -> None:
    """Points far away are projected into ball and bounds."""
    for x, bounds in _samples():
        ball = _ball(_norm(spec), x, _eps(spec, bounds), bounds)
        _check_inside(spec, ball, x, bounds, ball.project(_far(ball)), "project")


def check_project_keeps_inside(spec: NormSpec) -> None:
    """A point that is inside stays where it is, but for rounding."""
    for x, bounds in _samples():
        ball = _ball(_norm(spec), x, _eps(spec, bounds), bounds)
        inside = ball.project(_far(ball))
        off = float((ball.project(inside.clone()) - inside).abs().max())
        require(off <= 1e-5, f"project moves a point that is inside by {off:.3g}")


def check_select(spec: NormSpec) -> None:
    """The ball of some samples is the same ball."""
    keep = torch.arange(COUNT) % 2 == 0
    for x, bounds in _samples():
        ball = _ball(_norm(spec), x, _eps(spec, bounds), bounds)
        part, far = ball.select(keep), _far(ball)
        same = torch.equal(part.origin(), ball.origin()[keep])
        require(same, "select(keep).origin() is not origin()[keep]")
        close = torch.allclose(part.project(far[keep]), ball.project(far.clone())[keep], atol=1e-6)
        require(close, "select(keep).project(z[keep]) is not project(z)[keep]")


def check_differentiable(spec: NormSpec) -> None:
    """What decode gives has a gradient, and the steepest direction does not lead down it."""
    for x, bounds in _samples():
        ball = _ball(_norm(spec), x, _eps(spec, bounds), bounds)
        z = ball.random(_rng()).requires_grad_()
        upstream = torch.randn(x.shape)
        (gradient,) = torch.autograd.grad((ball.decode(z) * upstream).sum(), z, allow_unused=True)
        require(gradient is not None, "decode(z) has no gradient")
        try:
            direction = ball.steepest(gradient, z.detach())
        except ThreatError:  # the contract of a norm without a steepest direction, such as l0
            continue
        require(direction.shape == z.shape, f"steepest has shape {tuple(direction.shape)}, z {tuple(z.shape)}")
        rise = (direction * gradient).flatten(1).sum(1)
        require((rise >= 0).all(), "steepest leads down the gradient")


def _norm(spec: NormSpec) -> Norm:
    return resolve(spec)  # type: ignore[no-any-return]


def _ball(norm: Norm, x: Tensor, eps: float | None, bounds: tuple[float, float]) -> Ball:
    """Returns the ball, or skips the check: the contract of a norm that only measures is a ThreatError."""
    try:
        return norm.ball(x, eps, bounds)
    except ThreatError as error:
        raise SkipTest(f"it has no ball: {error}") from error


def _samples() -> Iterator[tuple[Tensor, tuple[float, float]]]:
    """Yields images of two shapes, in bounds [0, 1] and others; some values stand at the bounds."""
    for shape in ((1, 8, 8), (3, 5, 4)):
        for low, high in ((0.0, 1.0), WIDE):
            x = low + (high - low) * (0.5 + 0.4 * torch.randn(COUNT, *shape))
            yield x.clamp_(low, high), (low, high)


def _eps(spec: NormSpec, bounds: tuple[float, float]) -> float:
    return radius(spec.name, bounds)


def _rng() -> Rng:
    return Rng(0, range(COUNT))


def _far(ball: Ball) -> Tensor:
    origin = ball.origin()
    return origin + 10 * torch.randn(origin.shape)


def _distance(norm: Norm, ball: Ball, x: Tensor, z: Tensor) -> Tensor:
    return norm.distance(x, ball.decode(z), ball.witness(z))


def _check_inside(spec: NormSpec, ball: Ball, x: Tensor, bounds: tuple[float, float], z: Tensor, what: str) -> None:
    norm, eps, (low, high) = _norm(spec), _eps(spec, bounds), bounds
    worst = float(_distance(norm, ball, x, z).max())
    limit = norm.allowed(eps, x[0].numel(), bounds)
    require(worst <= limit, f"{what} gives a distance of {worst:.7g}, eps is {eps:.7g}")
    x_adv = ball.decode(z)
    got = float(x_adv.min()), float(x_adv.max())
    require(low <= got[0] and got[1] <= high, f"{what} gives values in {got}, the bounds are {bounds}")


NORM_CHECKS = (
    check_name,
    check_distance,
    check_allowed,
    check_origin,
    check_random,
    check_random_per_sample,
    check_project,
    check_project_keeps_inside,
    check_select,
    check_differentiable,
)

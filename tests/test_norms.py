"""Norms against numpy and against projections found by a general optimiser."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from robplug.norms import L0, L1, L2, LINF, PixelNorm
from robplug.rng import Rng

NORMS = [LINF, L2, L1, L0]
RADIUS = {"linf": 0.2, "l2": 0.7, "l1": 1.5, "l0": 3.0}


def images(count: int = 5, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    return torch.rand(count, 2, 3, 3) * (high - low) + low


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.name)
def test_distance_is_numpys(norm: PixelNorm) -> None:
    x, moved = images(), images()
    moved[0] = x[0]
    flat = (moved.double() - x.double()).flatten(1).numpy()
    expected = np.linalg.norm(flat, ord=norm.p, axis=1)
    measured = norm.distance(x, moved)
    assert measured.dtype == torch.float64
    np.testing.assert_allclose(measured.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.name)
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-2.0, 3.0), (0.0, 255.0)])
@given(seed=st.integers(0, 1000), eps=st.floats(0.0, 5.0))
@settings(max_examples=25, deadline=None)
def test_projection_and_random_points_are_inside(
    norm: PixelNorm, bounds: tuple[float, float], seed: int, eps: float
) -> None:
    torch.manual_seed(seed)
    low, high = bounds
    eps = eps * (1 if norm.name == "l0" else (high - low))
    x, z = images(4, low, high), images(4, low - 1, high + 1)
    ball = norm.ball(x, eps, bounds)
    for point in (ball.project(z.clone()), ball.random(Rng(seed, range(4)))):
        assert (norm.distance(x, point) <= norm.allowed(eps, x[0].numel(), bounds)).all()
        assert point.min() >= low and point.max() <= high
    assert torch.equal(ball.project(x.clone()), x)


@pytest.mark.parametrize("norm", [LINF, L2, L1], ids=lambda norm: norm.name)
def test_projection_is_the_nearest_point(norm: PixelNorm) -> None:
    """With the box far away, the projection is the Euclidean one; scipy finds it by constrained minimisation."""
    x = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    z = torch.tensor([[[[0.9, -0.5], [0.1, 0.3]]]], dtype=torch.float64)
    eps = RADIUS[norm.name]
    mine = norm.ball(x, eps, (-9.0, 9.0)).project(z.clone()).flatten().numpy()
    goal = z.flatten().numpy()

    # split into positive and negative parts, so that every ball is smooth or linear
    def value(parts: np.ndarray) -> float:
        return float(((parts[:4] - parts[4:] - goal) ** 2).sum())

    def room(parts: np.ndarray) -> np.ndarray:
        if norm.name == "linf":
            return eps - parts.reshape(2, 4).sum(0)
        return np.array([eps - parts.sum() if norm.name == "l1" else eps**2 - (parts**2).sum()])

    start = np.full(8, 1e-3)
    found = minimize(value, start, bounds=[(0, None)] * 8, constraints={"type": "ineq", "fun": room}, tol=1e-12)
    np.testing.assert_allclose(mine, found.x[:4] - found.x[4:], atol=1e-5)


def test_rounding_is_allowed_and_no_more() -> None:
    x = torch.rand(1, 3, 32, 32)
    eps = 1 / 255
    corner = x + eps  # float32 addition overshoots by up to half a unit in the last place
    values = x[0].numel()
    assert float(LINF.distance(x, corner)) <= LINF.allowed(eps, values, (0.0, 2.0))
    assert float(LINF.distance(x, x + eps * 1.001)) > LINF.allowed(eps, values, (0.0, 2.0))
    assert LINF.allowed(eps, values, (0.0, 1.0)) == pytest.approx(eps * (1 + 1e-6) + 2**-24, rel=1e-15)
    assert L2.allowed(0.5, 4, (0.0, 1.0)) == pytest.approx(0.5 * (1 + 1e-6) + 2 * 2**-24, rel=1e-15)
    assert L0.allowed(3, values, (0.0, 1.0)) == 3


@pytest.mark.parametrize("norm", [LINF, L2, L1], ids=lambda norm: norm.name)
def test_steepest_is_the_dual_direction(norm: PixelNorm) -> None:
    """<g, d> = dual norm of g, and d has norm 1."""
    gradient = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    x = torch.full_like(gradient, 0.5)
    direction = norm.ball(x, 1.0, (0.0, 1.0)).steepest(gradient, x)
    dual = {"linf": 1.0, "l2": 2.0, "l1": float("inf")}[norm.name]
    rise = (gradient * direction).flatten(1).sum(1)
    torch.testing.assert_close(rise, gradient.flatten(1).norm(p=dual, dim=1))
    unit = norm.distance(torch.zeros_like(direction), direction)
    torch.testing.assert_close(unit, torch.ones(3, dtype=torch.float64))


def test_l1_passes_over_values_that_stand_at_a_bound() -> None:
    x = torch.tensor([[[[1.0, 0.5]]]])
    gradient = torch.tensor([[[[5.0, 1.0]]]])
    assert L1.ball(x, 1.0, (0.0, 1.0)).steepest(gradient, x).flatten().tolist() == [0.0, 1.0]


def test_random_points_of_the_l2_ball_fill_it_evenly() -> None:
    """In d dimensions a share r^d of the points lies within radius r."""
    x = torch.zeros(4000, 1, 1, 2)
    radius = L2.distance(x, L2.ball(x, 1.0, (-1.0, 1.0)).random(Rng(0, range(4000))))
    share = float((radius <= 0.5).double().mean())
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5

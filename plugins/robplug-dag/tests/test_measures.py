"""Perceptibility, the permuted control, and the threat norm made of the first."""

from __future__ import annotations

import pytest
import torch

from robplug.errors import InputError
from robplug.norms import L2
from robplug.rng import Rng
from robplug_dag import perceptibility, permuted
from robplug_dag.norm import PERCEPTIBILITY

X = torch.rand(3, 3, 5, 7)


def test_perceptibility_is_its_definition() -> None:
    r = torch.randn(3, 3, 5, 7)
    for n in range(3):
        squares = [float(r[n, :, i, j].double().norm() ** 2) for i in range(5) for j in range(7)]
        expected = (sum(squares) / 35) ** 0.5
        assert perceptibility(r)[n].item() == pytest.approx(expected, rel=1e-12)
        assert perceptibility(r, (-1, 4))[n].item() == pytest.approx(expected / 5, rel=1e-12)


def test_permuting_moves_whole_rows_and_columns() -> None:
    r = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    out = permuted(r, Rng(0, range(2)))
    for n in range(2):
        rows = [int(value) // 6 for value in (out[n, 0, :, 0] - r[n, 0, 0, 0]).tolist()]
        columns = [int(value) % 6 for value in (out[n, 0, 0] - r[n, 0, 0, 0]).tolist()]
        assert sorted(rows) == list(range(4)) and sorted(columns) == list(range(6))
        assert torch.equal(out[n], r[n][:, rows][:, :, columns])
    torch.testing.assert_close(perceptibility(out), perceptibility(r), rtol=1e-12, atol=0)


def test_a_permutation_is_the_images_own() -> None:
    r = torch.randn(20, 3, 8, 8)
    out = permuted(r, Rng(0, range(20)))
    assert torch.equal(out[7:8], permuted(r[7:8], Rng(0, [7])))
    assert not torch.equal(out, permuted(r, Rng(1, range(20)))) and not torch.equal(out, r)
    with pytest.raises(InputError, match=r"perturbations \(2, C, H, W\), one for each stream, got \(20, 3, 8, 8\)"):
        permuted(r, Rng(0, range(2)))


def test_the_norm_is_the_measure_and_shows_the_largest_change_beside() -> None:
    x_adv = (X + 0.1 * torch.randn_like(X)).clamp(0, 1)
    r = x_adv.double() - X.double()
    assert torch.equal(PERCEPTIBILITY.distance(X, x_adv), perceptibility(r))
    torch.testing.assert_close(PERCEPTIBILITY.distance(X, x_adv), L2.distance(X, x_adv) / 35**0.5, rtol=1e-12, atol=0)
    assert torch.equal(PERCEPTIBILITY.measures(X, x_adv)["linf"], r.abs().flatten(1).amax(1))


def test_the_ball_has_the_norms_radius() -> None:
    """Without bounds in the way, projections lie on the sphere, and a steepest step is as long as it says."""
    ball = PERCEPTIBILITY.ball(X, 0.05, (-9.0, 9.0))
    far = ball.project(X + torch.randn_like(X))
    assert PERCEPTIBILITY.distance(X, far).tolist() == pytest.approx([0.05] * 3, rel=1e-5)
    step = ball.steepest(torch.randn_like(X), X)
    assert perceptibility(step).tolist() == pytest.approx([1.0] * 3, rel=1e-6)
    allowed = PERCEPTIBILITY.allowed(0.05, X[0].numel(), (-9.0, 9.0))
    inside = ball.random(Rng(0, range(3)))
    assert (PERCEPTIBILITY.distance(X, inside) <= allowed).all() and not torch.equal(inside, X)
    chosen = ball.select(torch.tensor([False, True, False])).project(X[1:2] + 1)
    assert PERCEPTIBILITY.distance(X[1:2], chosen).item() == pytest.approx(0.05, rel=1e-5)

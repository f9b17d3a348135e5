"""Adaptive C&W: never worse than C&W, what averaging changes and what not, and the host's rules."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import robplug
from robplug.carlini import CarliniWagner
from robplug.errors import InputError, ThreatError
from robplug.rng import Rng
from robplug.testing import Check, list_checks
from robplug.types import Attack, ThreatModel
from robplug_nsloss.attack import AveragedCarliniWagner, RestartedCarliniWagner, nearby

L2 = ThreatModel("l2")
SHORT = {"steps": 30, "step_size": 0.1, "binary_search_steps": 2, "initial_const": 10.0}


def attacked(attack: Attack, model: nn.Module, x: Tensor, y: Tensor, seed: int = 0) -> Tensor:
    return attack.run(robplug.target(model), x, y, L2, Rng(seed, range(len(x)))).x_adv


def distance(x: Tensor, x_adv: Tensor) -> Tensor:
    return (x_adv - x).flatten(1).norm(dim=1)


def digits() -> tuple[nn.Module, Tensor, Tensor]:
    model, x = robplug.target("robplug/digits-standard").module, robplug.dataset("digits", split="test").head(12).x
    return model, x, model(x).argmax(1)


def linear() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Returns a linear model of two classes, samples away from the bounds, predictions and distances to the plane."""
    torch.manual_seed(0)
    layer = nn.Linear(48, 2)
    model = nn.Sequential(nn.Flatten(), layer)
    x = 0.4 + 0.2 * torch.rand(8, 3, 4, 4)
    with torch.no_grad():
        logits = model(x)
        gap = (logits[:, 0] - logits[:, 1]).abs()
        return model, x, logits.argmax(1), gap / (layer.weight[0] - layer.weight[1]).norm()


@pytest.mark.parametrize("kind", [RestartedCarliniWagner, AveragedCarliniWagner])
def test_the_smallest_distance_on_a_linear_model(kind) -> None:  # type: ignore[no-untyped-def]
    model, x, y, least = linear()
    more = {"restarts": 2} if kind is RestartedCarliniWagner else {"draws": 2}
    x_adv = attacked(kind(steps=80, step_size=0.01, binary_search_steps=5, initial_const=1.0, **more), model, x, y)
    assert (model(x_adv).argmax(1) != y).all()
    found = distance(x, x_adv)
    assert (found >= least * (1 - 1e-4)).all() and (found <= least * 1.05 + 1e-3).all()


def test_more_starts_are_never_further_and_sometimes_nearer() -> None:
    model, x, y = digits()
    plain = distance(x, attacked(CarliniWagner(**SHORT), model, x, y))  # type: ignore[arg-type]
    one, two, four = (
        distance(x, attacked(RestartedCarliniWagner(restarts=n, **SHORT), model, x, y))  # type: ignore[arg-type]
        for n in (1, 2, 4)
    )
    assert torch.equal(one, plain)
    assert (two <= one).all() and (four <= two).all() and (four < one).any()


def test_averaging_changes_nothing_where_the_gradient_is_the_same_everywhere() -> None:
    """So few and small steps of one constant that no point around an image is beyond the plane."""
    model, x, y, least = linear()
    options = {"steps": 3, "step_size": 0.01, "binary_search_steps": 1, "initial_const": 1.0}
    far = least > 0.1
    assert far.any()
    goals = 1 - y[far]
    threat, rng = ThreatModel("l2", targeted=True), Rng(0, range(int(far.sum())))
    averaged, plain = (
        attack.run(robplug.target(model), x[far], None, threat, rng, y_goal=goals).x_adv
        for attack in (AveragedCarliniWagner(**options), CarliniWagner(**options))  # type: ignore[arg-type]
    )
    assert not torch.equal(averaged, x[far])
    torch.testing.assert_close(averaged, plain, rtol=0.0, atol=1e-6)


class Ripples(nn.Module):
    """Class 1 wins where the values' sum has grown by 0.3; steep ripples, 0.003 long, hide that slope."""

    def forward(self, x: Tensor) -> Tensor:
        change = (x - 0.4).flatten(1)
        ahead = (change + 0.002 * torch.sin(2000 * change)).sum(1)
        return torch.stack([torch.full_like(ahead, 0.3), ahead], 1)


def test_averaging_finds_the_slope_under_ripples() -> None:
    torch.manual_seed(0)
    x, y = 0.4 + 0.005 * torch.rand(6, 1, 4, 4), torch.zeros(6, dtype=torch.int64)
    options = {"steps": 60, "step_size": 0.002, "binary_search_steps": 1, "initial_const": 1.0}
    plain = attacked(CarliniWagner(**options), Ripples(), x, y)  # type: ignore[arg-type]
    averaged = attacked(AveragedCarliniWagner(radius=0.02, **options), Ripples(), x, y)  # type: ignore[arg-type]
    assert (Ripples()(plain).argmax(1) == 0).all()
    assert (Ripples()(averaged).argmax(1) == 1).all()


def test_points_are_uniform_in_the_ball_inside_the_bounds_and_pass_the_gradient_on() -> None:
    x = torch.full((4000, 3), 0.5, requires_grad=True)
    points = nearby(x, Rng(0, range(4000)), 0.1, (0.0, 1.0))
    length = (points - x).norm(dim=1).detach()
    assert length.max() <= 0.1 * (1 + 1e-5)
    # the share of a ball within half of the radius is 1/8; five standard deviations
    assert abs((length < 0.05).float().mean() - 0.125) < 5 * (0.125 * 0.875 / 4000) ** 0.5
    assert (points - x).mean(0).abs().max() < 0.005
    (gradient,) = torch.autograd.grad((points * torch.tensor([1.0, 2.0, 3.0])).sum(), x)
    assert torch.equal(gradient, torch.tensor([1.0, 2.0, 3.0]).expand(4000, 3))
    corner = torch.zeros(50, 3, requires_grad=True)
    points = nearby(corner, Rng(0, range(50)), 0.1, (0.0, 1.0))
    assert points.min() == 0
    (gradient,) = torch.autograd.grad(points.sum(), corner)
    assert torch.equal(gradient, torch.ones(50, 3))


@pytest.mark.parametrize("name", ["nsloss/cw-restarts", "nsloss/cw-averaged"])
def test_reproducible_and_independent_of_neighbours(name: str) -> None:
    model, x, y = digits()
    model, x, y = model.double(), x[:6].double(), y[:6]
    more = {"restarts": 4} if name == "nsloss/cw-restarts" else {"draws": 2}
    attack = robplug.attack(name, **{**SHORT, "steps": 20, **more})
    once, again, other = (attacked(attack, model, x, y, seed) for seed in (0, 0, 1))
    assert torch.equal(once, again) and not torch.equal(once, other)
    alone = [attack.run(robplug.target(model), x[i : i + 1], y[i : i + 1], L2, Rng(0, [i])).x_adv for i in range(6)]
    torch.testing.assert_close(torch.cat(alone), once, rtol=0.0, atol=1e-8)


def test_goals_are_reached() -> None:
    model, x, y = digits()
    goal = (y + 1) % 10
    for attack in (RestartedCarliniWagner(restarts=2, **SHORT), AveragedCarliniWagner(draws=2, **SHORT)):  # type: ignore[arg-type]
        threat = ThreatModel("l2", targeted=True)
        found = attack.run(robplug.target(model), x, None, threat, Rng(0, range(12)), y_goal=goal)
        assert found.claim is not None and torch.equal(found.claim, model(found.x_adv).argmax(1) == goal)
        assert found.claim.float().mean() > 0.8


def test_bad_input_is_named() -> None:
    for kind, options, words in (
        (RestartedCarliniWagner, {"restarts": 0}, "restarts >= 1, got 0"),
        (RestartedCarliniWagner, {"start_radius": 0.0}, "a finite start_radius > 0, got 0.0"),
        (AveragedCarliniWagner, {"draws": 0}, "draws >= 1, got 0"),
        (AveragedCarliniWagner, {"radius": -0.1}, "a finite radius > 0, got -0.1"),
        (AveragedCarliniWagner, {"steps": 0}, "steps >= 1, got 0"),
    ):
        with pytest.raises(InputError, match=words):
            kind(**options)
    model, x, y = digits()
    for threat in (ThreatModel("linf"), ThreatModel("l2", 0.5)):
        with pytest.raises(ThreatError, match=r"norm l2 and eps=None, got .*robplug/pgd keeps a radius"):
            RestartedCarliniWagner().run(robplug.target(model), x, y, threat, Rng(0, range(12)))


OF_THE_SPEC = {"resolves", "frozen_dataclass", "params", "fields_documented"}
QUICK = {"steps": 12, "step_size": 0.01, "binary_search_steps": 2, "initial_const": 100.0}
FEW = {"nsloss/cw-restarts": {**QUICK, "restarts": 2}, "nsloss/cw-averaged": {**QUICK, "draws": 2}}


def checks() -> list[object]:
    """The host's rules with few steps: the Spec's take 90,000 a sample."""
    params = []
    for check in list_checks("robplug-nsloss"):
        if check.spec.name in FEW:
            short = replace(check, spec=replace(check.spec, params={**check.spec.params, **FEW[check.spec.name]}))
            used = check if check.name in OF_THE_SPEC else short
            params.append(pytest.param(used, id=f"{check.spec.name}-{check.name}"))
    return params


@pytest.mark.parametrize("check", checks())
def test_conformance(check: Check) -> None:
    check()

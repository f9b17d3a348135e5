"""The attack loop against closed forms: on a linear model the optimum of each norm is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import robplug
from robplug.errors import InputError, ThreatError
from robplug.loop import Problem, Steps, ascend, cross_entropy, margin
from robplug.norms import LINF
from robplug.rng import Rng

OPTIMUM = {"linf": (0.05, 1.0), "l2": (0.4, 2.0), "l1": (0.8, float("inf"))}
"""Radius of each norm, and the exponent of the dual norm of the weights, which gives the largest change of a score."""


def linear(classes: int = 2) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, classes))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(classes, 16))
    return model.double()


class Decisive(nn.Module):
    """A random network whose decisions change from image to image."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(16, 32), nn.Linear(32, classes)
        with torch.no_grad():
            self.hidden.weight.copy_(torch.randn(32, 16))
            self.out.weight.copy_(torch.randn(classes, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden(x.flatten(1) - 0.5).relu())


@pytest.mark.parametrize("name", ["linf", "l2", "l1"])
@pytest.mark.parametrize("attack", ["robplug/pgd", "robplug/fgsm"])
@pytest.mark.parametrize("targeted", [False, True])
def test_linear_models_are_attacked_optimally(name: str, attack: str, targeted: bool) -> None:
    model = linear()
    x = torch.full((6, 1, 4, 4), 0.5, dtype=torch.float64) + 0.05 * torch.randn(6, 1, 4, 4, dtype=torch.float64)
    y = model(x).argmax(1)
    eps, dual = OPTIMUM[name]
    options = {} if attack.endswith("fgsm") else {"early_stop": False, "random_start": False, "steps": 10}
    goal = 1 - y if targeted else None
    threat = robplug.ThreatModel(name, eps, targeted=targeted, bounds=(-5, 5))
    target = robplug.target(model, bounds=(-5, 5))
    x_adv = robplug.attack(attack, **options).run(target, x, y, threat, Rng(0, range(6)), y_goal=goal).x_adv
    weights = model[1].weight
    rise = margin(model(x_adv), y) - margin(model(x), y)
    torch.testing.assert_close(
        rise, torch.full((6,), eps * float((weights[0] - weights[1]).detach().norm(p=dual)), dtype=x.dtype)
    )


@pytest.mark.parametrize("name", ["linf", "l2", "l1"])
def test_early_stop_changes_no_verdict(name: str) -> None:
    torch.manual_seed(3)
    model = Decisive()
    target = robplug.target(model)
    x = torch.rand(40, 1, 4, 4)
    y = model(x).argmax(1)
    threat = robplug.ThreatModel(name, {"linf": 0.075, "l2": 0.2, "l1": 0.4}[name])
    broken = {}
    for stop in (True, False):
        result = robplug.attack("robplug/pgd", early_stop=stop, steps=15).run(target, x, y, threat, Rng(0, range(40)))
        broken[stop] = model(result.x_adv).argmax(1) != y
        assert result.claim is None or torch.equal(result.claim, broken[stop])
    assert 5 < int(broken[False].sum()) < 40
    assert bool((broken[True] >= broken[False]).all())  # an iterate that broke is kept, the last one may not break


def test_samples_leave_the_batch_once_broken() -> None:
    rows = []

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = linear(4).float()

        def forward(self, x: Tensor) -> Tensor:
            rows.append(len(x))
            return self.inner(x)

    target = robplug.target(Counting())
    x = torch.rand(30, 1, 4, 4)
    y = target.predict(x)
    rows.clear()
    robplug.attack("robplug/pgd", steps=10).run(target, x, y, robplug.ThreatModel("linf", 0.2), Rng(0, range(30)))
    assert rows == sorted(rows, reverse=True) and rows[-1] < rows[0] == 30


def test_momentum_is_that_of_mi_fgsm() -> None:
    """Against the recursion of Dong et al. written out."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 5)).double()
    target = robplug.target(model)
    x = torch.rand(4, 1, 4, 4, dtype=torch.float64)
    y = model(x).argmax(1)
    problem = Problem(target, y, LINF.ball(x, 0.1, (0.0, 1.0)), Rng(0, range(4)))
    mine = ascend(problem, Steps(steps=6, step_size=0.02, momentum=0.9, early_stop=False)).x_adv
    z, velocity = x.clone(), torch.zeros_like(x)
    for _ in range(6):
        z.requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(model(z), y).sum(), z)
        velocity = 0.9 * velocity + gradient / gradient.flatten(1).norm(p=1, dim=1).view(-1, 1, 1, 1)
        z = (x + (z.detach() + 0.02 * velocity.sign() - x).clamp(-0.1, 0.1)).clamp(0, 1)
    torch.testing.assert_close(mine, z, atol=1e-12, rtol=0)


def test_restarts_never_make_it_weaker_and_keep_the_best() -> None:
    torch.manual_seed(1)
    model = Decisive(3)
    target = robplug.target(model)
    x = torch.rand(60, 1, 4, 4)
    y = model(x).argmax(1)
    threat = robplug.ThreatModel("linf", 0.06)
    broken = []
    for restarts in (1, 4):
        attack = robplug.attack("robplug/pgd", steps=3, restarts=restarts)
        broken.append(model(attack.run(target, x, y, threat, Rng(0, range(60))).x_adv).argmax(1) != y)
    assert bool((broken[1] >= broken[0]).all()) and int(broken[1].sum()) > int(broken[0].sum()) > 0


def test_transforms_are_averaged_over_draws() -> None:
    """A transform that adds a random offset leaves a linear model's gradient as it is."""
    model = linear()
    target = robplug.target(model)
    x = torch.rand(3, 1, 4, 4, dtype=torch.float64)
    y = model(x).argmax(1)
    problem = Problem(target, y, LINF.ball(x, 0.1, (0.0, 1.0)), Rng(0, range(3)))
    seen = []

    def shifted(images: Tensor, rng: Rng) -> Tensor:
        offset = rng.uniform((1, 1, 1), like=images)
        seen.append(float(offset[0]))
        return images + offset

    plain = ascend(problem, Steps(steps=2, step_size=0.05, early_stop=False)).x_adv
    moved = ascend(problem, Steps(steps=2, step_size=0.05, transform=shifted, draws=3)).x_adv
    torch.testing.assert_close(plain, moved)
    assert len(set(seen)) == 6


def test_pgd_takes_a_transform_and_draws() -> None:
    model = linear(3)
    target = robplug.target(model)
    x = torch.rand(3, 1, 4, 4, dtype=torch.float64)
    y = model(x).argmax(1)
    calls = []

    def flipped(images: Tensor, rng: Rng) -> Tensor:
        calls.append(rng.ids)
        return images.flip(3)

    threat = robplug.ThreatModel("linf", 0.1)
    options = {"steps": 4, "random_start": False, "early_stop": False}
    seen = robplug.attack("robplug/pgd", transform=flipped, draws=2, **options)
    mirrored = robplug.target(nn.Sequential(Flip(), model))
    plain = robplug.attack("robplug/pgd", **options)
    found, expected = (a.run(t, x, y, threat, Rng(0, range(3))).x_adv for a, t in ((seen, target), (plain, mirrored)))
    torch.testing.assert_close(found, expected)
    assert calls == 8 * [(0, 1, 2)]


class Flip(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(3)


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    model = Decisive().double()
    target = robplug.target(model)
    x = torch.rand(8, 1, 4, 4, dtype=torch.float64)
    y = model(x).argmax(1)
    threat = robplug.ThreatModel("l2", 0.3)
    attack = robplug.attack("robplug/pgd", steps=5)
    together = attack.run(target, x, y, threat, Rng(0, range(8))).x_adv
    alone = torch.cat([attack.run(target, x[i : i + 1], y[i : i + 1], threat, Rng(0, [i])).x_adv for i in range(8)])
    torch.testing.assert_close(together, alone, atol=1e-12, rtol=0)


def test_bad_input_is_named() -> None:
    target = robplug.target(linear().float())
    x = torch.rand(2, 1, 4, 4)
    y = target.predict(x)
    attack = robplug.attack("robplug/pgd")
    threat = robplug.ThreatModel("linf", 0.1)
    rng = Rng(0, range(2))
    cases = [
        ((x.mul(255).byte(), y, threat), InputError, "torch.uint8"),
        ((x.numpy(), y, threat), InputError, r"x to be a tensor, got ndarray; torch\.from_numpy"),
        ((x, y.tolist(), threat), InputError, "y to be a tensor, got list"),
        ((x + 1, y, threat), InputError, "inside the bounds"),
        ((x * float("nan"), y, threat), InputError, "nan"),
        ((x, y[:1], threat), InputError, r"shape \(2,\)"),
        ((x, y.float(), threat), InputError, "integer dtype"),
        ((x, y - 5, threat), InputError, "-5"),
        ((x, y, robplug.ThreatModel("linf", None)), ThreatError, "eps=None"),
        ((x, y, robplug.ThreatModel("linf", 0.1, bounds=(-1, 1))), ThreatError, "bounds"),
        ((x, y, robplug.ThreatModel("linf", 0.1, targeted=True)), ThreatError, "y_goal"),
        ((x, y, robplug.ThreatModel("l0", 3)), ThreatError, "l0"),
    ]
    for (bad_x, bad_y, bad_threat), error, text in cases:
        with pytest.raises(error, match=text):
            attack.run(target, bad_x, bad_y, bad_threat, rng)
    with pytest.raises(ThreatError, match="scores"):
        attack.run(robplug.target(linear().float(), offers="scores"), x, y, threat, rng)
    with pytest.raises(InputError, match="draws >= 1, got 0"):
        robplug.attack("robplug/pgd", draws=0)
    with pytest.raises(InputError, match="function of images and streams, got 'flip'; give it in Python"):
        robplug.attack("robplug/pgd", transform="flip")
    with pytest.raises(InputError, match="steps >= 1, got 0"):
        robplug.attack("robplug/pgd", steps=0, step_size=0.1).run(target, x, y, threat, rng)

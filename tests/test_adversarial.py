"""Adversarial training against closed forms on linear models, and on the real digits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import robplug
from robplug.adversarial import AdversarialTraining
from robplug.data import Dataset
from robplug.defenses import Stack
from robplug.errors import InputError, RobplugError
from robplug.rng import Rng
from robplug.step import Step, attacking, current_pass
from robplug.training import fit
from robplug.zoo import digits_cnn


def toy(count: int = 40) -> Dataset:
    x = torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    return Dataset("toy", x, (x.mean((1, 2, 3)) > 0.5).long())


def linear() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 2))


def with_norm() -> nn.Module:
    torch.manual_seed(3)
    layers = (nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(16, 2))
    return nn.Sequential(*layers)


def a_step(model: nn.Module, data: Dataset) -> Step:
    return Step(model, data.x, data.y, Rng(0, range(len(data))))


def test_adversarial_gradient_of_a_linear_model_is_the_closed_form() -> None:
    data, model, eps = toy(), linear(), 0.05
    data = Dataset("inside", data.x * 0.8 + 0.1, data.y)  # the box is never met
    stack = Stack(AdversarialTraining(eps=eps, steps=3))
    stack.prepare(model)
    step = a_step(model, data)
    stack.losses(step).total.backward()
    weight, bias = (parameter.detach().clone().requires_grad_() for parameter in model.parameters())
    flat = data.x.flatten(1)
    logits = flat @ weight.T + bias
    own, other = data.y, 1 - data.y
    # the worst change is -eps * sign(w_own - w_other): the margin falls by eps * ||w_own - w_other||_1
    margin = logits.gather(1, own[:, None]) - logits.gather(1, other[:, None])
    fall = eps * (weight[own] - weight[other]).abs().sum(1, keepdim=True)
    F.softplus(fall - margin).mean().backward()
    torch.testing.assert_close(model[1].weight.grad, weight.grad)
    torch.testing.assert_close(model[1].bias.grad, bias.grad)
    assert step.x_adv is not None and float((step.x_adv - data.x).abs().max()) <= eps * (1 + 1e-6)


@pytest.mark.parametrize("goal", ["random", "least-likely"])
def test_goals_are_wrong_classes(goal: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 4)
    x, y = torch.rand(400, 5), torch.randint(4, (400,))
    step = Step(model, x, y, Rng(0, range(400)))
    eps = 0.01
    stack = Stack(AdversarialTraining(eps=eps, steps=1, step_size=1.0, goal=goal, random_start=False))
    stack.prepare(model)
    stack.losses(step)
    # on a linear model one step of the attack goes to the corner given by the gradient of the goal's cross-entropy
    corners = []
    for goal_class in range(4):
        z = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(z), torch.full((400,), goal_class), reduction="sum"), z)
        corners.append((x - eps * gradient.sign()).clamp(0, 1))
    reached = torch.stack([torch.isclose(step.x_adv, corner, atol=1e-6).all(1) for corner in corners], dim=1)
    distinct = torch.stack(corners).unique(dim=0).shape[0] == 4
    assert distinct and reached.any(1).all()
    wrong = torch.ones(400, 4, dtype=torch.bool).scatter(1, y[:, None], False)
    assert (reached & wrong).any(1).all()
    if goal == "least-likely":
        least = model(x).scatter(1, y[:, None], math.inf).argmin(1)
        assert reached.gather(1, least[:, None]).all()
    else:
        only = reached.sum(1) == 1
        offset = (reached[only].int().argmax(1) - y[only]) % 4
        assert (offset.bincount(minlength=4)[1:] > 60).all()


def test_clean_share_and_label_smoothing() -> None:
    data, model = toy(), linear()
    untouched = 0
    for number in range(200):
        step = Step(model, data.x, data.y, Rng(number, range(40)))
        Stack(AdversarialTraining(eps=0.1, steps=1, clean_share=0.3)).defenses[0].objective(step)
        untouched += bool(torch.equal(step.x_adv, data.x))
    assert 40 <= untouched <= 80
    step = a_step(model, data)
    smooth = AdversarialTraining(clean_share=1.0, label_smoothing=0.2).objective(step)
    torch.testing.assert_close(smooth, F.cross_entropy(model(data.x), data.y, label_smoothing=0.2))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_attack_mode_is_that_of_batch_norm_and_moves_nothing(mode: str) -> None:
    model = with_norm().train()
    seen: list[tuple[str, bool, bool]] = []
    model[1].register_forward_hook(lambda bn, i, o: seen.append((current_pass(), bn.training, model[3].training)))
    stack = Stack(AdversarialTraining(eps=0.1, steps=2, attack_mode=mode))
    stack.prepare(model)
    stack.train_mode()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with attacking(model, mode):
        model(toy().x)
    assert all(torch.equal(buffers[name], buffer) for name, buffer in model.named_buffers())
    assert all(part.training for part in model.modules())
    stack.train_batch(a_step(model, toy()), torch.optim.SGD(model.parameters(), 0.1))
    attacker, update = ("attacker", mode == "train", False), ("update", True, True)
    assert set(seen) == {attacker, update} and seen[-1] == update and seen.count(update) == 1
    assert int(model[1].num_batches_tracked) == 1
    assert current_pass() == "evaluation"


@pytest.mark.parametrize(
    "wrong",
    [{"goal": "any"}, {"attack_mode": "test"}, {"clean_share": 1.5}, {"steps": 0}, {"patience": 0}, {"eps": -0.1}],
)
def test_unfit_parameters_of_adversarial_training_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises((InputError, RobplugError), match=str(next(iter(wrong.values())))):
        robplug.defense("robplug/at", **wrong)


def robust_accuracy(model: nn.Module) -> float:
    data = robplug.dataset("digits", split="test")
    target = robplug.target(model)
    threat = robplug.ThreatModel(norm="linf", eps=0.2)
    x_adv = robplug.attack("robplug/pgd", steps=10).run(target, data.x, data.y, threat, Rng(0, range(len(data)))).x_adv
    return float((target.predict(x_adv) == data.y).float().mean())


def clean_accuracy(model: nn.Module) -> float:
    data = robplug.dataset("digits", split="test")
    return float((model(data.x).argmax(1) == data.y).float().mean())


def test_adversarial_training_on_digits_makes_robust(tmp_path: Path) -> None:
    train = robplug.dataset("digits", split="train")
    torch.manual_seed(0)
    standard, robust = digits_cnn(), digits_cnn()
    fit(standard, train, "robplug/none", epochs=6, batch_size=32)
    at = robplug.defense("robplug/at", eps=0.2, steps=3)
    fit(robust, train, at, epochs=10, batch_size=32)
    assert clean_accuracy(standard) > 0.97 and clean_accuracy(robust) > 0.93
    assert robust_accuracy(standard) < 0.1
    assert robust_accuracy(robust) > 0.4

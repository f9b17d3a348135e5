"""Targets: bounds, BPDA, stochastic models, modes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import robplug
from robplug.errors import InputError
from robplug.rng import Rng
from robplug.targets import evaluation_mode


def net() -> nn.Module:
    """A network whose decisions change from image to image."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 3))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(32, 16))
        model[1].bias.copy_(-model[1].weight.sum(1) / 2)
    return model


def quantise(x: Tensor) -> Tensor:
    return (x * 4).round() / 4


def test_bpda_has_the_real_value_and_the_substitutes_gradient() -> None:
    model = net()
    x = torch.rand(5, 1, 4, 4, requires_grad=True)
    plain = robplug.target(model, transform=quantise)
    (gradient,) = torch.autograd.grad(plain.logits(x).sum(), x)
    assert float(gradient.abs().max()) == 0  # rounding has no gradient
    target = robplug.target(model, transform=quantise, backward="identity")
    logits = target.logits(x)
    assert torch.equal(logits, model(quantise(x)))
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    inner = quantise(x).detach().requires_grad_()
    (expected,) = torch.autograd.grad(model(inner).sum(), inner)
    assert torch.equal(gradient, expected)
    doubled = robplug.target(model, transform=quantise, backward=lambda x: 2 * x)
    (gradient,) = torch.autograd.grad(doubled.logits(x).sum(), x)
    assert torch.equal(gradient, 2 * expected)


def test_bpda_breaks_what_a_shattered_gradient_hides() -> None:
    model = net()
    x = torch.rand(40, 1, 4, 4)
    y = model(quantise(x)).argmax(1)
    threat, attack = robplug.ThreatModel("linf", 0.3), robplug.attack("robplug/pgd", random_start=False)
    broken = {}
    for backward in (None, "identity"):
        target = robplug.target(model, transform=quantise, backward=backward)
        x_adv = attack.run(target, x, y, threat, Rng(0, range(40))).x_adv
        broken[backward] = int((target.predict(x_adv) != y).sum())
    assert broken[None] == 0 < broken["identity"]


class Noisy(nn.Module):
    """Adds noise of its own generator to the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()
        self.generator = torch.Generator()

    def reset(self, seed: int) -> None:
        self.generator.manual_seed(seed)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x)
        return logits + torch.randn(logits.shape, generator=self.generator)


def test_a_stochastic_target_starts_over_and_averages() -> None:
    target = robplug.target(Noisy(), stochastic=True, eot=500, draws=400)
    x = torch.rand(6, 1, 4, 4)
    target.reset(1)
    first = target.logits(x)
    target.reset(1)
    assert torch.equal(target.logits(x), first)
    assert not torch.equal(target.logits(x), first)
    with torch.no_grad():
        exact = target.module.inner(x)
        averaged = target.for_attack().logits(x)
    assert float((averaged - exact).abs().max()) < 5 / 500**0.5
    target.reset(2)
    agreement = (target.predict(x) == target.predict(x)).float().mean()
    assert float(agreement) >= 5 / 6


def test_options_that_contradict_each_other() -> None:
    for options, text in [
        ({"bounds": (1, 0)}, "low < high"),
        ({"offers": "weights"}, "weights"),
        ({"eot": 3}, "stochastic=True"),
        ({"backward": "identity"}, "transform"),
        ({"transform": quantise, "backward": "sign"}, "sign"),
        ({"draws": 0, "stochastic": True}, "draws >= 1"),
    ]:
        with pytest.raises(InputError, match=text):
            robplug.target(net(), **options)
    with pytest.raises(InputError, match="a dict"):
        robplug.target({})


def test_evaluation_mode_gives_every_module_its_mode_back() -> None:
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3))
    model[1].eval()
    with pytest.raises(RuntimeError, match="inside"), evaluation_mode(model):
        assert not model[0].training
        raise RuntimeError("inside")
    assert model.training and model[0].training and not model[1].training


def test_an_attack_on_a_model_in_train_mode_moves_nothing() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(), nn.Flatten(), nn.Linear(16, 3)).train()
    x = torch.rand(6, 1, 4, 4)
    target = robplug.target(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("robplug/pgd", "robplug/fgsm", "robplug/noise"):
        for y in (None, torch.zeros(6, dtype=torch.int64)):
            robplug.attack(name).run(target, x, y, robplug.ThreatModel("linf", 0.2), Rng(0, range(6)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(part.training for part in model.modules())

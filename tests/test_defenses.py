"""The seam of defences: shared passes, penalties, surgery, against formulas and plain torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robplug
from robplug.adversarial import AdversarialTraining
from robplug.data import Dataset
from robplug.defenses import Defense, NoDefense, Prepared, Stack
from robplug.errors import InputError
from robplug.plugins import registry
from robplug.registry import resolve
from robplug.rng import Rng
from robplug.step import Step
from robplug.testing.checks import PIECES
from robplug.training import fit


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


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@dataclass(frozen=True)
class Penalty(Defense):
    """Adds the mean squared gradient of the summed loss with respect to x, and logs another value."""

    strength: float = 3.0
    adversarial: bool = False

    def penalty(self, step: Step) -> tuple[Tensor, Tensor]:
        asked = step.adv() if self.adversarial else step.clean()
        (gradient,) = torch.autograd.grad(asked.loss.sum(), asked.x, create_graph=True)
        surrogate = self.strength * gradient.square().flatten(1).sum(1).mean()
        return torch.tensor(7.0), surrogate


@dataclass(frozen=True)
class Other(Defense):
    """An objective."""

    def objective(self, step: Step) -> Tensor:
        return step.clean().loss.sum()


def test_penalty_is_added_and_its_value_logged() -> None:
    data, model = toy(), linear()
    stack = Stack([Penalty(), Penalty(strength=1.0)])
    stack.prepare(model)
    losses = stack.losses(a_step(model, data))
    probability = model(data.x).softmax(1).gather(1, (1 - data.y)[:, None])[:, 0]
    difference = model[1].weight[0] - model[1].weight[1]
    by_hand = (probability**2).mean() * difference.square().sum()  # dL/dx = p_other * (w_other - w_own)
    torch.testing.assert_close(losses.total, F.cross_entropy(model(data.x), data.y) + 4 * by_hand)
    torch.testing.assert_close(losses.objective, F.cross_entropy(model(data.x), data.y).detach())
    assert losses.penalties == {"Penalty": torch.tensor(14.0)}
    losses.total.backward()
    analytic = model[1].weight.grad.clone()
    model.zero_grad()
    (F.cross_entropy(model(data.x), data.y) + 4 * (probability**2).mean() * difference.square().sum()).backward()
    torch.testing.assert_close(analytic, model[1].weight.grad)


def test_passes_are_shared_and_only_the_objective_moves_batch_norm() -> None:
    model, peer = with_norm(), with_norm()
    model[3].p = peer[3].p = 0.0
    calls: list[int] = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    stack = Stack([AdversarialTraining(eps=0.1, steps=2), Penalty(adversarial=True), Penalty()])
    stack.prepare(model)
    stack.train_mode()
    step = a_step(model, toy())
    stack.train_batch(step, torch.optim.SGD(model.parameters(), 0.1))
    assert len(calls) == 2 + 1 + 1  # attack, adversarial pass shared, clean pass
    peer.train()(step.x_adv)
    torch.testing.assert_close(model[1].running_mean, peer[1].running_mean)
    torch.testing.assert_close(model[1].running_var, peer[1].running_var)


def test_adversarial_pass_without_an_adversary_is_an_error() -> None:
    with pytest.raises(InputError, match='put "robplug/at"'):
        Stack(Penalty(adversarial=True)).defenses[0].penalty(a_step(linear(), toy()))


@dataclass(frozen=True)
class Both(Defense):
    """The loss of a batch and of its negative in one pass, whose parts are shared."""

    def objective(self, step: Step) -> Tensor:
        step.x_adv = 1 - step.x
        clean, adv = step.together((step.x, step.y), (step.x_adv, step.y))
        step.give(clean=clean, adv=adv)
        return clean.loss.mean() + adv.loss.mean()


def test_the_parts_of_one_pass_are_shared() -> None:
    data, model, calls = toy(), linear(), []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    stack = Stack([Both(), Penalty(adversarial=True), Penalty(strength=1.0), Surgeon(layers=("1",))])
    stack.prepare(model)
    losses = stack.losses(step := a_step(model, data))
    assert len(calls) == 1
    expected = F.cross_entropy(model(data.x), data.y) + F.cross_entropy(model(1 - data.x), data.y)
    torch.testing.assert_close(losses.objective, expected.detach())
    difference = (model[1].weight[0] - model[1].weight[1]).square().sum()
    other = (1 - data.y)[:, None]
    for strength, x in ((3, 1 - data.x), (1, data.x)):  # dL/dx = p_other * (w_other - w_own)
        expected = expected + strength * (model(x).softmax(1).gather(1, other) ** 2).mean() * difference
    torch.testing.assert_close(losses.total, expected + 0.5)  # the surgeon's parameter
    torch.testing.assert_close(step.adv().activations["1"], model(1 - data.x))
    assert losses.right is not None and torch.equal(losses.right, model(data.x).argmax(1) == data.y)
    analytic = torch.autograd.grad(losses.total, model[1].weight)
    torch.testing.assert_close(analytic, torch.autograd.grad(expected, model[1].weight))


def test_a_pass_of_some_samples_is_not_shared() -> None:
    step = a_step(linear(), toy())
    step.x_adv = 1 - step.x
    some, adv = step.together((step.x[:3], step.y[:3]), (step.x_adv, step.y))
    assert len(some.loss) == 3
    with pytest.raises(InputError, match="a pass of all 40 samples as clean, got 3"):
        step.give(clean=some)
    step.give(adv=adv)
    assert len(step.clean().loss) == 40 and step.adv() is adv


def test_two_objectives_are_refused() -> None:
    with pytest.raises(InputError, match="AdversarialTraining and Other"):
        Stack(["robplug/at", Penalty(), Other()])
    with pytest.raises(InputError, match=r"derived from robplug\.defenses\.Defense"):
        Stack([object()])  # type: ignore[list-item]


@dataclass(frozen=True)
class Surgeon(Defense):
    """Multiplies the logits by a new parameter, which escapes weight decay, and keeps another in its state."""

    announce: bool = True
    replace: bool = False
    layers: tuple[str, ...] = ()

    def prepare(self, model: nn.Module) -> Prepared:
        scale, outside = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.tensor(2.0))
        model.register_parameter("scale", scale)
        if self.replace:
            model[1].bias = nn.Parameter(model[1].bias.detach().clone())
        new = (scale, outside) if self.announce else (outside,)
        return Prepared(outside, new, no_decay=(scale, model[1].weight), layers=self.layers)

    def penalty(self, step: Step) -> Tensor:
        outside: nn.Parameter = step.state
        return 0.5 * (outside - 3.0).square()

    def finish(self, model: nn.Module) -> nn.Module:
        seen.append(
            (float(model.scale.detach()), {name: value.detach().clone() for name, value in model.named_parameters()})
        )
        del model.scale
        return model


seen: list[tuple[float, dict[str, Tensor]]] = []


@dataclass(frozen=True)
class Silent(Defense):
    """An objective that says nothing: whatever moves, moves by weight decay."""

    def objective(self, step: Step) -> Tensor:
        return 0.0 * step.clean().loss.sum()


def test_new_parameters_are_trained_and_some_escape_weight_decay() -> None:
    model = linear()
    before = state(model)
    seen.clear()
    options: dict[str, Any] = {"epochs": 1, "batch_size": 40, "lr": 0.1, "weight_decay": 0.5, "schedule": "constant"}
    assert fit(model, toy(), [Silent(), Surgeon()], **options) is model
    scale, after = seen[0]
    assert scale == 1.5 and "scale" not in dict(model.named_parameters())
    assert torch.equal(after["1.weight"], before["1.weight"])
    torch.testing.assert_close(after["1.bias"], before["1.bias"] * (1 - 0.1 * 0.5))


def test_a_parameter_that_only_a_defence_keeps_is_trained() -> None:
    kept: list[nn.Parameter] = []

    @dataclass(frozen=True)
    class Keeper(Surgeon):
        def penalty(self, step: Step) -> Tensor:
            kept.append(step.state)
            return super().penalty(step)

    fit(linear(), toy(), Keeper(), epochs=1, batch_size=40, lr=0.1, weight_decay=0.0, momentum=0.0, schedule="constant")
    assert math.isclose(float(kept[0].detach()), 2.0 - 0.1 * (2.0 - 3.0), rel_tol=1e-6)


def test_surgery_is_checked() -> None:
    with pytest.raises(InputError, match="announce all new parameters, got also scale"):
        Stack(Surgeon(announce=False)).prepare(linear())
    with pytest.raises(InputError, match=r"keep the model's parameters, got without 1\.bias"):
        Stack(Surgeon(replace=True)).prepare(linear())
    with pytest.raises(InputError, match=r"a layer of Sequential for Surgeon, got '11'; there is 1"):
        Stack(Surgeon(layers=("11",))).prepare(linear())


def test_activations_of_named_layers_are_kept() -> None:
    model = linear()
    stack = Stack(Surgeon(layers=("0", "1")))
    stack.prepare(model)
    step = a_step(model, toy())
    stack.losses(step)
    clean = step.clean()
    assert torch.equal(clean.activations["0"], toy().x.flatten(1)) and clean.activations["1"] is clean.logits
    assert not model[0]._forward_hooks


@dataclass(frozen=True)
class Watching(Defense):
    """Watches each pass; what it sees is a list that fills while the pass is made."""

    def prepare(self, model: nn.Module) -> Prepared:
        @contextmanager
        def watching() -> Iterator[list[int]]:
            seen: list[int] = []
            handle = model.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
            yield seen
            handle.remove()
            seen.append(-1)

        return Prepared(state=watching, observer=watching)

    def penalty(self, step: Step) -> Tensor:
        step.model(step.x)  # no pass of the step's
        assert step.clean().observed[step.state] == [len(step.x), -1]
        return step.clean().loss.sum() * 0


def test_passes_are_observed() -> None:
    """Each defence has its own observer, whoever asks for a pass first; a part of a pass has none."""
    model = linear()
    stack = Stack([Watching(), AdversarialTraining(steps=1), Watching()])
    stack.prepare(model)
    step = a_step(model, toy())
    stack.losses(step)
    clean, adv = step.clean().observed, step.adv().observed
    assert len(clean) == 2 and clean.keys() == adv.keys()
    assert len({id(seen) for seen in (*clean.values(), *adv.values())}) == 4
    assert step.together((step.x, step.y), (step.x, step.y))[0].observed == {}
    assert not model._forward_hooks


def test_mode_and_after_step_are_called() -> None:
    @dataclass(frozen=True)
    class Frozen(Defense):
        def mode(self, model: nn.Module) -> None:
            model[1].eval()

        def after_step(self, model: nn.Module) -> None:
            with torch.no_grad():
                model[5].bias.zero_()

    model = with_norm()
    fit(model, toy(), Frozen(), epochs=2, batch_size=16)
    assert int(model[1].num_batches_tracked) == 0 and (model[5].bias == 0).all()
    assert not model.training


def test_specs_agree_with_their_classes() -> None:
    for name in ("robplug/at", "robplug/none", "robplug/crop-flip"):
        spec = registry().spec("defense", name)
        made = resolve(spec)()
        assert {key: getattr(made, key) for key in spec.params} == dict(spec.params)
        assert set(spec.params) == set(made.__dataclass_fields__)
        assert spec.pieces == tuple(p for p in PIECES if getattr(type(made), p) is not getattr(Defense, p))
    assert isinstance(robplug.defense("robplug/none"), NoDefense)

"""The defences in training: the gradient of a whole step, the number of passes, batch norm, stacks and presets."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robplug
from robplug.defenses import Defense, Prepared, Stack
from robplug.errors import InputError
from robplug.rng import Rng
from robplug.step import Step
from robplug_nsloss import jacobian_penalty, ns_loss
from robplug_nsloss.defense import DIRECTIONS, NOISE, Combined, JacobianRegularization, NsLoss


def network(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).double()
    for _ in range(3):
        model(torch.randn(16, 1, 6, 6, dtype=torch.float64))
    return model


def a_step(model: nn.Module, seed: int = 0) -> Step:
    torch.manual_seed(1)
    x = torch.rand(6, 1, 6, 6, dtype=torch.float64)
    # the host's loss is in single precision
    return Step(model, x, torch.arange(6) % 3, Rng(seed, range(6)), loss_of=partial(F.cross_entropy, reduction="none"))


def generator(step: Step, use: int) -> torch.Generator:
    return torch.Generator().manual_seed(step.rng.at_restart(use).batch_seed())


def prepared(model: nn.Module, *defenses: str | Defense) -> Stack:
    stack = Stack(defenses)
    stack.prepare(model)
    stack.train_mode()
    return stack


def gradients(value: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(model.parameters()), materialize_grads=True))


def close(found: list[Tensor], expected: list[Tensor]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all((a - b).abs().max() <= 1e-12 * max(1.0, float(b.abs().max())) for a, b in pairs)


@pytest.mark.parametrize("frozen", [True, False])
def test_gradient_of_a_step(frozen: bool) -> None:
    """Cross-entropy and both penalties, each of passes of its own, against one step of the stack."""
    model, reference = network(), network()
    defense = Combined(3.0, 0.7, 4, frozen_batch_norm=frozen, jacobian_strength=0.5, projections=2)
    losses = prepared(model, defense).losses(a_step(model))
    reference.train()
    for part in reference:
        part.training = not (frozen and isinstance(part, nn.BatchNorm2d))
    step = a_step(reference)
    sensitivity = ns_loss(reference, step.x, radius=0.7, draws=4, generator=generator(step, NOISE))
    jacobian = jacobian_penalty(reference, step.x, projections=2, generator=generator(step, DIRECTIONS))
    expected = F.cross_entropy(reference(step.x), step.y) + 3 * sensitivity + 0.5 * jacobian
    assert losses.total.detach().item() == pytest.approx(expected.detach().item(), rel=1e-12)
    assert losses.penalties["Combined"].item() == pytest.approx(3 * sensitivity.item() + 0.5 * jacobian.item())
    assert close(gradients(losses.total, model), gradients(expected, reference))


@pytest.mark.parametrize(
    ("dropout", "defenses", "passes"),
    [
        (0.0, [NsLoss(draws=4)], 5),  # the clean pass is shared
        (0.0, [NsLoss(draws=4), JacobianRegularization()], 5),
        (0.0, [NsLoss(draws=4, frozen_batch_norm=False)], 5),
        (0.5, [NsLoss(draws=4)], 6),  # and not with dropout
    ],
)
def test_number_of_passes(dropout: float, defenses: list[Defense], passes: int) -> None:
    model, count = network(dropout), 0

    def counts(*_: Any) -> None:
        nonlocal count
        count += 1

    model.register_forward_hook(counts)
    prepared(model, *defenses).losses(a_step(model))
    assert count == passes


def test_dropout_stays_in_the_main_pass_and_out_of_the_comparison() -> None:
    model = network(dropout=0.5)
    stack, step = prepared(model, NsLoss(strength=1.0)), a_step(model)
    torch.manual_seed(0)
    losses = stack.losses(step)
    torch.manual_seed(0)
    assert losses.objective.item() == pytest.approx(F.cross_entropy(model(step.x), step.y).item(), rel=1e-12)
    alone = ns_loss(copy.deepcopy(model).eval(), step.x, generator=generator(step, NOISE))
    assert losses.penalties["NsLoss"].item() == pytest.approx(alone.item(), rel=1e-12)


@pytest.mark.parametrize("make", [NsLoss, JacobianRegularization, Combined])
def test_batch_norm_is_frozen_unless_it_is_not_wanted(make: Any) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepared(model, make()).train_batch(a_step(model), optimizer)
    after = model.state_dict()
    assert torch.equal(before["1.running_mean"], after["1.running_mean"])
    assert not torch.equal(before["1.weight"], after["1.weight"]) and model[3].training

    model, plain = network(), network()
    prepared(model, make(frozen_batch_norm=False)).losses(a_step(model))
    prepared(plain).losses(a_step(plain))
    after, wanted = model.state_dict(), plain.state_dict()
    assert not torch.equal(before["1.running_mean"], wanted["1.running_mean"])
    assert all(torch.equal(after[key], wanted[key]) for key in wanted if "running" in key or "tracked" in key)


@dataclass(frozen=True)
class Probe(Defense):
    """A penalty that looks at batch norm."""

    def penalty(self, step: Step) -> None:
        step.state.append([step.model[1].training, step.model[1].running_mean.clone()])

    def prepare(self, model: nn.Module) -> Prepared:
        return Prepared(state=[])


def test_penalties_behind_find_batch_norm_as_those_before() -> None:
    model, step = network(), a_step(network())
    step.model = model
    probes = Probe(), Probe()
    stack = prepared(model, probes[0], NsLoss(frozen_batch_norm=False), probes[1])
    stack.losses(step)
    (first,), (second,) = (stack._prepared[place].state for place in (0, 2))
    assert first[0] and second[0] and torch.equal(first[1], second[1])


def test_strength_one_is_the_raw_penalty() -> None:
    model = network().eval()
    step = a_step(model)
    raw = ns_loss(model, step.x, generator=generator(step, NOISE))
    assert NsLoss(strength=1.0).penalty(step).item() == pytest.approx(raw.item(), rel=1e-12)
    assert NsLoss(strength=4.0).penalty(a_step(model)).item() == pytest.approx(4 * raw.item(), rel=1e-12)
    raw = jacobian_penalty(model, step.x, generator=generator(step, DIRECTIONS))
    assert JacobianRegularization(strength=1.0).penalty(step).item() == pytest.approx(raw.item(), rel=1e-12)


def test_draws_follow_the_step() -> None:
    model = network().eval()
    values = [NsLoss().penalty(a_step(model, seed)).item() for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


def test_stacks_with_adversarial_training() -> None:
    model = network()
    stack = prepared(model, robplug.defense("robplug/at", eps=0.1, norm="l2", steps=2), "nsloss/combined")
    step = a_step(model)
    losses = stack.losses(step)
    assert step.x_adv is not None and set(losses.penalties) == {"Combined"}
    reference = network()
    for part in reference.train():
        part.training = not isinstance(part, nn.BatchNorm2d)
    sensitivity = ns_loss(reference, step.x, generator=generator(step, NOISE))
    jacobian = jacobian_penalty(reference, step.x, generator=generator(step, DIRECTIONS))
    adversarial = F.cross_entropy(reference(step.x_adv), step.y)
    expected = gradients(adversarial + 2 * sensitivity + 0.01 * jacobian, reference)
    assert close(gradients(losses.total, model), expected)


def test_noisy_copies_are_clipped_to_the_bounds() -> None:
    model, step = network().eval(), a_step(network())
    step.model, step.bounds = model, (0.2, 0.8)
    step.x.clamp_(0.2, 0.8)
    expected = ns_loss(model, step.x, clip=(0.2, 0.8), generator=generator(step, NOISE))
    assert NsLoss(strength=1.0, clip=True).penalty(step).item() == pytest.approx(expected.item(), rel=1e-12)


def test_layers_are_looked_for_before_training() -> None:
    with pytest.raises(InputError, match="expected a layer of Sequential, got '11'; there is "):
        prepared(network(), NsLoss(layers=["11"]))
    model = network()
    losses = prepared(model, NsLoss(strength=1.0, layers=["0", "logits"])).losses(a_step(model))
    expected = ns_loss(model.eval(), a_step(model).x, layers=["0", "logits"], generator=generator(a_step(model), NOISE))
    assert losses.penalties["NsLoss"].item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nsloss/nsloss", NsLoss(2.0, 1.0, 5)),
        ("nsloss/nsloss@mnist", NsLoss(2.0, 1.0, 5)),
        ("nsloss/nsloss@cifar10", NsLoss(10.0, 3.0, 10)),
        ("nsloss/jacobian@mnist", JacobianRegularization(0.01)),
        ("nsloss/jacobian@cifar10", JacobianRegularization(0.1)),
        ("nsloss/combined@mnist", Combined(2.0, 1.0, 5, jacobian_strength=0.01)),
        ("nsloss/combined@cifar10", Combined(10.0, 3.0, 10, jacobian_strength=0.01)),
    ],
)
def test_presets_are_those_of_table_1(name: str, expected: Defense) -> None:
    assert robplug.defense(name) == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NsLoss(strength=-1.0), "expected a finite strength >= 0, got -1.0"),
        (lambda: NsLoss(radius=0.0), "expected a finite radius > 0, got 0.0; the paper has 1.0"),
        (lambda: NsLoss(draws=0), "expected draws from 1 to 127, got 0"),
        (lambda: JacobianRegularization(strength=float("nan")), "expected a finite strength >= 0, got nan"),
        (lambda: JacobianRegularization(projections=0), "expected projections >= 1, or None"),
        (lambda: Combined(jacobian_strength=float("inf")), "expected a finite jacobian_strength >= 0, got inf"),
        (lambda: Combined(radius=-1.0), "expected a finite radius > 0, got -1.0"),
        (lambda: Combined(projections=-1), "expected projections >= 1, or None"),
    ],
)
def test_parameters_are_checked(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()

"""The defences: against autograd through an explicit sampler, in each normalisation, exact and differenced."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robplug
from robplug.defenses import AUGMENTATION, Defense, Stack
from robplug.errors import InputError
from robplug.rng import Rng
from robplug.step import Step, current_pass
from robplug.zoo import digits_cnn
from robplug_flow import fgr, to_pixels, warp
from robplug_flow.defense import (
    DeformationTraining,
    FlowGradientRegularization,
    InputGradientRegularization,
    RandomFlow,
)

SHAPE = (2, 6, 5)


def network(activation: type[nn.Module] = nn.ReLU, dropout: float = 0.0, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(SHAPE[0], 8, 3, padding=1),
        nn.BatchNorm2d(8),
        activation(),
        nn.Dropout(dropout),
        nn.Conv2d(8, 8, 3, padding=1),
        activation(),
        nn.Flatten(),
        nn.Linear(8 * 30, 3),
    )


def batch(count: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.rand(count, *SHAPE, dtype=dtype), torch.arange(count) % 3


def a_step(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    return Step(model, x, y, Rng(0, range(len(x))))


def gradients(value: Tensor, model: nn.Module) -> Tensor:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(value, parameters, materialize_grads=True, allow_unused=True)
    return torch.cat([g.flatten() for g in found])


def sampled(x: Tensor, flow: Tensor) -> Tensor:
    """Bilinear sampling written out with gathers, for flows of 0 <= v < 1: its derivative at 0 is the forward one."""
    height, width = x.shape[2:]
    rows, cols = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")

    def at(row: Tensor, col: Tensor) -> Tensor:
        return x[:, :, row.clamp(max=height - 1), col.clamp(max=width - 1)]

    down, right = flow[:, :1], flow[:, 1:]
    upper = (1 - right) * at(rows, cols) + right * at(rows, cols + 1)
    lower = (1 - right) * at(rows + 1, cols) + right * at(rows + 1, cols + 1)
    return (1 - down) * upper + down * lower


def explicit_penalty(model: nn.Module, x: Tensor, y: Tensor, unit: str, mean_loss: bool = False) -> Tensor:
    """Returns the mean squared flow gradient, by autograd through the sampler."""
    flow = torch.zeros(len(x), 2, *x.shape[2:], dtype=x.dtype, requires_grad=True)
    pixels = {"pixel": (1.0, 1.0), "normalized": (2.5, 2.0)}[unit]  # 6 rows, 5 columns
    moved = sampled(x, flow * torch.tensor(pixels, dtype=x.dtype).view(2, 1, 1))
    loss = F.cross_entropy(model(moved), y, reduction="mean" if mean_loss else "sum")
    (slope,) = torch.autograd.grad(loss, flow, create_graph=True)
    return slope.square().sum((1, 2, 3)).mean()


@pytest.mark.parametrize("unit", ["pixel", "normalized"])
@pytest.mark.parametrize("train", [True, False])
def test_penalty_and_its_gradient_are_those_of_the_sampler(unit: str, train: bool) -> None:
    model = network(nn.Tanh).double().train(train)
    x, y = batch(dtype=torch.float64)
    mine = FlowGradientRegularization(0.7, unit=unit).penalty(a_step(model, x, y))
    other = 0.7 * explicit_penalty(model, x, y, unit)
    torch.testing.assert_close(mine, other, rtol=1e-6, atol=0)  # the loss is float32
    torch.testing.assert_close(gradients(mine, model), gradients(other, model), rtol=1e-4, atol=1e-7)


def test_a_constant_image_has_no_penalty() -> None:
    model, (_, y) = network(), batch()
    x = torch.full((4, *SHAPE), 0.3)
    for gradient in ("exact", "difference"):
        penalty = FlowGradientRegularization(1.0, gradient=gradient).penalty(a_step(model.eval(), x, y))
        assert float(penalty.detach()) == 0.0
        assert gradients(penalty, model).isfinite().all()


def test_normalisations_of_the_same_image_at_batch_1_and_4() -> None:
    model, (x, y) = network().eval(), batch(1)

    def ratio(defense) -> float:  # type: ignore[no-untyped-def]
        one, four = (defense.penalty(a_step(model, x.repeat(n, 1, 1, 1), y.repeat(n))) for n in (1, 4))
        return float((one / four).detach())

    assert ratio(FlowGradientRegularization(1.0)) == pytest.approx(1, rel=1e-4)
    assert ratio(FlowGradientRegularization(1.0, "paper")) == pytest.approx(16, rel=1e-4)
    assert ratio(InputGradientRegularization(1.0)) == pytest.approx(1, rel=1e-4)
    assert ratio(InputGradientRegularization(1.0, "paper")) == pytest.approx(16, rel=1e-4)
    assert ratio(InputGradientRegularization(1.0, "paper", squared=False)) == pytest.approx(4, rel=1e-4)


def test_the_papers_lambda_as_printed_is_that_of_the_batch_mean() -> None:
    model, (x, y) = network().eval(), batch(128)
    printed = FlowGradientRegularization(400, normalisation="paper").penalty(a_step(model, x, y))
    own = 400 * explicit_penalty(model, x, y, "normalized", mean_loss=True)
    torch.testing.assert_close(printed, own, rtol=1e-4, atol=0)
    torch.testing.assert_close(FlowGradientRegularization().penalty(a_step(model, x, y)), own, rtol=1e-4, atol=0)
    igr = InputGradientRegularization(3000, normalisation="paper").penalty(a_step(model, x, y))
    torch.testing.assert_close(InputGradientRegularization().penalty(a_step(model, x, y)), igr)


@pytest.mark.parametrize("squared", [True, False])
def test_input_gradient_penalty_sample_by_sample(squared: bool) -> None:
    model, (x, y) = network(nn.Tanh).eval(), batch()
    total = torch.zeros(())
    for one, label in zip(x.split(1), y.split(1), strict=True):
        one = one.requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(model(one), label), one, create_graph=True)
        total = total + (slope.square().sum() if squared else slope.norm())
    mine = InputGradientRegularization(0.5, squared=squared).penalty(a_step(model, x.detach(), y))
    torch.testing.assert_close(mine, 0.5 * total / 4)
    torch.testing.assert_close(gradients(mine, model), gradients(0.5 * total / 4, model), rtol=1e-4, atol=1e-6)


def both(model: nn.Module, x: Tensor, y: Tensor, **options: float) -> tuple[Tensor, Tensor, float]:
    """Returns both penalties, exact and differenced, and the cosine of their gradients; the draws are the same."""
    found = []
    for gradient in ("exact", "difference"):
        torch.manual_seed(5)
        with torch.random.fork_rng():
            penalty = FlowGradientRegularization(gradient=gradient, **options).penalty(a_step(model, x, y))
        found.append((penalty.detach(), gradients(penalty, model)))
    return found[0][0], found[1][0], float(F.cosine_similarity(found[0][1], found[1][1], dim=0))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_differenced_gradient_of_a_smooth_network_is_the_exact_one(dropout: float) -> None:
    model = network(nn.SiLU, dropout).train()
    exact, difference, cosine = both(model, *batch(16), rho=1e-3)
    assert cosine >= 0.999
    torch.testing.assert_close(exact, difference)


def test_differenced_gradient_has_the_exact_length() -> None:
    model, (x, y) = network(nn.SiLU).double().train(), batch(16, torch.float64)
    one, other = (
        gradients(FlowGradientRegularization(gradient=gradient).penalty(a_step(model, x, y)), model)
        for gradient in ("exact", "difference")
    )
    torch.testing.assert_close(other.norm(), one.norm(), rtol=5e-3, atol=0)


def test_the_second_pass_is_displaced_as_the_formula_says() -> None:
    """By h u, u_c = kappa_row^2 r D_row x_c + kappa_col^2 s D_col x_c; r and s are the flow gradient in pixels."""
    model, (x, y) = network(nn.SiLU).double().eval(), batch(dtype=torch.float64)
    x = x * torch.tensor([1.0, 0.1, 2.0, 0.5]).view(-1, 1, 1, 1)
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    FlowGradientRegularization(gradient="difference", rho=0.01).penalty(a_step(model, x, y))
    assert len(seen) == 2 and torch.equal(seen[0], x)
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)
    down, right = F.pad(x[:, :, 1:] - x[:, :, :-1], (0, 0, 0, 1)), F.pad(x[..., 1:] - x[..., :-1], (0, 1))
    r, s = ((g * change).sum(1, keepdim=True) for change in (down, right))
    u = 2.5**2 * r * down + 2.0**2 * s * right  # 6 rows, 5 columns
    h = 0.01 * x.flatten(1).norm(dim=1).mean() / u.flatten(1).norm(dim=1).square().mean().sqrt()
    torch.testing.assert_close(seen[1] - x, h * u, rtol=1e-4, atol=1e-8)  # the loss is float32


def test_differenced_gradient_of_relu_is_another_estimator() -> None:
    _, _, cosine = both(network(nn.ReLU).train(), *batch(16), rho=1e-2)
    assert 0.3 < cosine < 0.999


def test_draws_of_a_pass_made_before_are_not_mistaken() -> None:
    """The clean pass was made, other draws followed: the penalty draws anew, the same in both its passes."""
    model, (x, y) = network(nn.SiLU, 0.5).train(), batch(16)
    step = a_step(model, x, y)
    with torch.random.fork_rng():
        step.clean()
        torch.rand(7)
        before = torch.get_rng_state()
        penalty = FlowGradientRegularization(gradient="difference").penalty(step)
        torch.set_rng_state(before)
        exact = FlowGradientRegularization().penalty(a_step(model, x, y))
    assert float(F.cosine_similarity(gradients(penalty, model), gradients(exact, model), dim=0)) >= 0.999


@pytest.mark.parametrize("gradient", ["exact", "difference"])
def test_in_a_stack_running_statistics_move_once(gradient: str) -> None:
    plain, x, y = network(nn.SiLU).train(), *batch(8)
    defended = copy.deepcopy(plain)
    stack = Stack(FlowGradientRegularization(gradient=gradient))
    stack.prepare(defended)
    stack.losses(a_step(defended, x, y)).total.backward()
    plain(x)
    for (name, one), (_, other) in zip(plain.named_buffers(), defended.named_buffers(), strict=True):
        torch.testing.assert_close(other, one, msg=name)


def stacked(model: nn.Module, x: Tensor, y: Tensor, *defences: Any) -> tuple[Any, Tensor]:
    """Returns the losses of a stack, and the gradient of their total; the draws are the same in each call."""
    stack = Stack(defences)
    stack.prepare(model)
    torch.manual_seed(5)
    losses = stack.losses(a_step(model, x, y))
    return losses, gradients(losses.total, model)


@dataclass(frozen=True)
class PlainObjective(Defense):
    """The plain objective as somebody else's: a differenced penalty then differentiates the clean pass itself."""

    def objective(self, step: Step) -> Tensor:
        return step.clean().loss.mean()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("others", [(), (InputGradientRegularization(0.3),)])
def test_one_backward_pass_for_images_and_parameters_changes_nothing(dropout: float, others: tuple[Any, ...]) -> None:
    model, (x, y) = network(nn.SiLU, dropout).double().train(), batch(8, torch.float64)
    model[0].weight.requires_grad_(False)
    model.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    penalty = FlowGradientRegularization(0.5, gradient="difference")
    losses, gradient = stacked(copy.deepcopy(model), x, y, penalty, *others)
    expected, direction = stacked(copy.deepcopy(model), x, y, PlainObjective(), penalty, *others)
    torch.testing.assert_close(losses.objective, expected.objective)
    assert losses.right is not None and expected.right is not None and torch.equal(losses.right, expected.right)
    if not dropout:  # where passes draw, the two penalties meet other draws
        torch.testing.assert_close(losses.total.detach(), expected.total.detach())
        assert float((gradient - direction).norm() / direction.norm()) < 1e-5  # the loss is float32
    exact, smooth = stacked(copy.deepcopy(model), x, y, FlowGradientRegularization(0.5), *others)
    assert float(F.cosine_similarity(gradient, smooth, dim=0)) >= (0.999 if not others or not dropout else 0.9)
    name = "FlowGradientRegularization"
    torch.testing.assert_close(losses.penalties[name], exact.penalties[name])


def test_a_differenced_step_goes_backward_twice() -> None:
    """Through the clean pass once, for images and parameters, and through the displaced one."""
    model, (x, y) = network(nn.SiLU).train(), batch(8)
    for defences, expected in (((), 2), ((PlainObjective(),), 3)):
        seen: list[int] = []

        def watch(module: nn.Module, args: Any, out: Tensor, seen: list[int] = seen) -> None:
            out.register_hook(lambda gradient: seen.append(1))

        handle = model[0].register_forward_hook(watch)
        stacked(model, x, y, *defences, FlowGradientRegularization(gradient="difference"))
        handle.remove()
        assert len(seen) == expected


def test_the_objective_gives_way_to_that_of_another_defence() -> None:
    model, (x, y) = network(nn.SiLU).train(), batch(8)
    adt = DeformationTraining(eps=0.05, steps=1)
    alone, _ = stacked(copy.deepcopy(model), x, y, adt)
    both_of_them, _ = stacked(copy.deepcopy(model), x, y, FlowGradientRegularization(gradient="difference"), adt)
    torch.testing.assert_close(both_of_them.objective, alone.objective)


def test_fgr_in_one_line_of_any_training_loop() -> None:
    model, (x, y) = network().train(), batch(8)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    explicit = 0.1 * explicit_penalty(copy.deepcopy(model), x, y, "normalized").detach()
    for gradient in ("exact", "difference"):
        penalty = fgr(model, x, y, strength=0.1, gradient=gradient)
        torch.testing.assert_close(penalty.detach(), explicit)
        assert gradients(penalty, model).norm() > 0
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_deformation_training_of_a_linear_model_is_the_closed_form() -> None:
    """On ramps every step has the same sign, so that seven of them end at the corner of the budget."""
    rows, cols = torch.meshgrid(torch.arange(6.0), torch.arange(5.0), indexing="ij")
    x = torch.stack([rows + cols, 2 * rows - cols + 4])[:, None] / 14
    y = torch.tensor([0, 1])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(30, 2, bias=False))
    loss = DeformationTraining(eps=0.1).objective(step := a_step(model, x, y))
    weight = model[1].weight.detach().view(2, 6, 5)
    down, right = torch.zeros_like(x), torch.zeros_like(x)
    down[:, :, :-1], right[..., :-1] = x[:, :, 1:] - x[:, :, :-1], x[..., 1:] - x[..., :-1]
    rise = (weight[1 - y] - weight[y])[:, None]
    flow = to_pixels(0.1 * torch.cat([(down * rise).sign(), (right * rise).sign()], dim=1))
    torch.testing.assert_close(step.x_adv, warp(x, flow))
    torch.testing.assert_close(loss, F.cross_entropy(model(warp(x, flow)), y))


def test_deformation_training_is_the_papers_iteration_on_the_network_in_eval_mode(
    plain_steps: Callable[..., Tensor], plain_warp: Callable[..., Tensor]
) -> None:
    """Seven steps inside a budget of 0.01 half sides; the loss is that of the network in train mode, asked once."""
    model, (x, y) = network(nn.Tanh, 0.5).double().train(), batch(dtype=torch.float64)
    other = copy.deepcopy(model).eval()
    kinds: list[str] = []
    model.register_forward_pre_hook(lambda module, args: kinds.append(current_pass()))
    torch.manual_seed(2)
    loss = DeformationTraining().objective(step := a_step(model, x, y))
    assert kinds == 7 * ["attacker"] + ["evaluation"]  # "update" inside of a training loop
    flow = plain_steps(lambda moved: F.cross_entropy(other(moved), y, reduction="sum"), x, 0.01, (2.5, 2.0), 7)
    assert flow.abs().amax() == 0.025 and flow.abs().unique().numel() > 4  # not only corners of the budget
    torch.testing.assert_close(step.x_adv, plain_warp(x, flow))
    torch.manual_seed(2)
    expected = F.cross_entropy(other.train()(step.x_adv), y)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)  # the loss is float32
    assert all(torch.equal(*pair) for pair in zip(model.buffers(), other.buffers(), strict=True))


def ramps(count: int) -> Tensor:
    """Images of 41 x 31 whose channels are row and column: a warp adds the flow to them, but for the edges."""
    return (
        torch.stack(torch.meshgrid(torch.arange(41.0), torch.arange(31.0), indexing="ij"))
        .double()
        .repeat(count, 1, 1, 1)
    )


def revealed(x: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the flow of moved ramps, by axis, where it does not reach an edge."""
    return tuple((moved - x)[:, :, 6:-6, 6:-6].unbind(1))


def test_deformation_training_from_a_random_start_begins_anywhere_in_the_budget() -> None:
    x, model = ramps(8), nn.Sequential(nn.Flatten(), nn.Linear(2 * 41 * 31, 2)).double()
    step = Step(model, x, torch.zeros(8, dtype=torch.int64), Rng(0, range(8)), bounds=(0.0, 40.0))
    DeformationTraining(0.1, steps=1, step_size=0.0, random_start=True).objective(step)
    for flow, radius in zip(revealed(x, step.x_adv), (2.0, 1.5), strict=True):
        assert 0.99 * radius < flow.abs().max() <= radius * (1 + 1e-6)
        assert float(flow.std()) == pytest.approx(radius / 3**0.5, rel=0.03) and abs(flow.mean()) < 0.03 * radius


@pytest.mark.parametrize(("unit", "sigma", "pixels"), [("normalized", 0.06, (1.2, 0.9)), ("pixel", 0.8, (0.8, 0.8))])
def test_random_flows_are_normal_and_independent(unit: str, sigma: float, pixels: tuple[float, float]) -> None:
    x = ramps(16)
    step = a_step(nn.Identity(), x, torch.zeros(16))
    step.bounds = (float(x.min()), float(x.max()))
    moved = RandomFlow(sigma, unit).augment(step)
    down, right = revealed(x, moved)
    for flow, std in ((down, pixels[0]), (right, pixels[1])):
        assert float(flow.std()) == pytest.approx(std, rel=0.03) and abs(flow.mean()) < 0.03 * std
        assert float((flow.abs() < std).double().mean()) == pytest.approx(0.683, abs=0.015)  # of a uniform flow, 0.577
        assert abs((flow[:, 1:] * flow[:, :-1]).mean()) < 0.04 * std**2
        assert abs((flow[:, :, 1:] * flow[:, :, :-1]).mean()) < 0.04 * std**2
    assert abs((down * right).mean()) < 0.04 * pixels[0] * pixels[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_random_flows_of_no_size_leave_the_images_bit_for_bit(dtype: torch.dtype) -> None:
    x, y = batch(dtype=dtype)
    moved = RandomFlow(0.0).augment(a_step(nn.Identity(), x, y))
    assert moved.dtype == dtype and torch.equal(moved, x)
    assert not torch.equal(RandomFlow().augment(a_step(nn.Identity(), x, y)), x)


def test_random_flows_are_a_samples_own_and_drawn_anew_in_each_step() -> None:
    x, y = batch(2)
    defense, model = RandomFlow(0.1), nn.Identity()
    company = defense.augment(step := Step(model, x, y, Rng(0, [3, 7])))
    assert torch.equal(defense.augment(Step(model, x[1:], y[1:], Rng(0, [7]))), company[1:])
    again = defense.augment(step)
    other = defense.augment(Step(model, x, y, Rng(1, [3, 7])))
    assert not torch.equal(company, again) and not torch.equal(company, other)
    seen: list[Tensor] = []
    model = digits_cnn()
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    robplug.train(model, robplug.dataset("digits", split="train").head(1), "flow/random-flow", epochs=3, batch_size=1)
    assert len({tuple(images.flatten().tolist()) for images in seen}) == len(seen) == 3


def test_random_flows_move_what_the_rest_of_a_stack_sees() -> None:
    model, (x, y) = network(nn.Tanh).eval(), batch()
    defenses = [robplug.defense("flow/random-flow", sigma=0.1), robplug.defense("flow/fgr", strength=0.7)]
    stack = Stack(defenses)
    stack.prepare(model)
    losses = stack.losses(a_step(model, x, y))
    step = a_step(model, x, y)
    step.rng = step.rng.at_restart(AUGMENTATION)
    moved = RandomFlow(0.1).augment(step)
    torch.testing.assert_close(losses.objective, F.cross_entropy(model(moved), y).detach())
    expected = 0.7 * explicit_penalty(model, moved, y, "normalized").detach()
    torch.testing.assert_close(losses.penalties["FlowGradientRegularization"], expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "stack", [["flow/adt", "flow/fgr"], ["robplug/at", "flow/fgr"], ["flow/random-flow", "flow/adt", "flow/igr"]]
)
def test_stacks_train_on_digits(stack: list[str]) -> None:
    data = robplug.dataset("digits", split="train").head(64)
    torch.manual_seed(0)
    model = digits_cnn()
    before = copy.deepcopy(model.state_dict())
    robplug.train(model, data, stack, epochs=1, batch_size=32)
    assert all(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_training_with_fgr_lowers_the_penalty_of_unseen_digits() -> None:
    train, test = (robplug.dataset("digits", split=split) for split in ("train", "test"))
    measured = []
    for defenses in ([], [robplug.defense("flow/fgr", strength=0.1)]):
        torch.manual_seed(0)
        model = robplug.train(digits_cnn(), train.head(400), defenses, epochs=4, batch_size=32)
        penalty = FlowGradientRegularization(1.0).penalty(a_step(model, test.x, test.y))
        with torch.no_grad():
            measured.append((float(penalty.detach()), float((model(test.x).argmax(1) == test.y).float().mean())))
    (plain, accuracy), (regularised, kept) = measured
    assert regularised < 0.4 * plain and kept > accuracy - 0.03


def test_the_art_trainer_takes_the_defences() -> None:
    pytest.importorskip("art")
    from art.estimators.classification import PyTorchClassifier

    data = robplug.dataset("digits", split="train").head(32)
    torch.manual_seed(0)
    model = digits_cnn()
    before = model.conv1.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"optimizer": optimizer, "clip_values": (0.0, 1.0), "device_type": "cpu"}
    classifier = PyTorchClassifier(model, nn.CrossEntropyLoss(), (1, 8, 8), 10, **options)
    trainer = robplug.adapters.art.trainer("flow/fgr", classifier, strength=400, normalisation="paper")
    trainer.fit(data.x.numpy(), data.y.numpy().astype(np.int64), batch_size=16, nb_epochs=1)
    assert not torch.equal(model.conv1.weight, before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlowGradientRegularization(-1.0), "expected a finite strength >= 0, got -1.0"),
        (lambda: FlowGradientRegularization(normalisation="mean"), "expected normalisation to be sample or paper"),
        (lambda: FlowGradientRegularization(unit="px"), "expected unit to be pixel or normalized, got 'px'"),
        (lambda: FlowGradientRegularization(gradient="fast"), "expected gradient to be exact or difference"),
        (lambda: FlowGradientRegularization(rho=0.0), "expected rho between 0 and 1, got 0.0"),
        (lambda: InputGradientRegularization(float("nan")), "expected a finite strength >= 0, got nan"),
        (lambda: DeformationTraining(eps=-0.1), "expected eps >= 0"),
        (lambda: DeformationTraining(steps=0), "expected steps >= 1, got 0"),
        (lambda: RandomFlow(-0.1), "expected a finite sigma >= 0, got -0.1"),
        (lambda: RandomFlow(float("inf")), "expected a finite sigma >= 0, got inf"),
        (lambda: RandomFlow(float("nan")), "expected a finite sigma >= 0, got nan"),
        (lambda: RandomFlow(unit="px"), "expected unit to be pixel or normalized, got 'px'"),
    ],
)
def test_parameters_are_checked(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()


def test_samples_without_rows_and_columns_are_refused() -> None:
    model, y = nn.Linear(7, 2), torch.tensor([0, 1])
    with pytest.raises(InputError, match=r"expected images of shape \(N, C, H, W\), got \(2, 7\)"):
        fgr(model, torch.rand(2, 7), y)
    with pytest.raises(InputError, match=r"expected images of shape \(N, C, H, W\), got \(2, 7\)"):
        RandomFlow().augment(a_step(model, torch.rand(2, 7), y))

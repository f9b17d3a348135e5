"""The ratio of clean samples, what remains of a converted network, and chapter 6's attack."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robplug
from robplug.defenses import Defense, Stack
from robplug.errors import InputError
from robplug.rng import Rng
from robplug.step import Step
from robplug_advprop import convert, keep_only, route
from robplug_advprop.attackers import Attacker
from robplug_advprop.defense import AdvProp, Mixture, VanillaMixing


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.SiLU(), nn.Flatten(), nn.Linear(216, 10)]
    return nn.Sequential(*layers)


def batch(count: int = 10) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.rand(count, 1, 8, 8), torch.arange(count) % 10


def a_step(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    return Step(model, x, y, Rng(0, range(len(x))))


def apart(model: nn.Module) -> nn.Module:
    """Makes the auxiliary statistics of a converted network others than the main ones."""
    torch.manual_seed(2)
    layer: Any
    for layer in model[1].auxiliary:
        for tensor in (layer.weight, layer.running_mean):
            nn.init.normal_(tensor)
        nn.init.uniform_(layer.running_var, 0.5, 2.0)
    return model


@pytest.mark.parametrize(("ratio", "clean"), [(0.0, 0), (0.2, 2), (0.6, 6), (1.0, 10)])
@pytest.mark.parametrize("average", [False, True])
def test_every_image_weighs_the_same_at_any_ratio(ratio: float, clean: int, average: bool) -> None:
    (x, y), model = batch(), network().train()
    one, other = copy.deepcopy(model), copy.deepcopy(model)
    params: dict[str, Any] = {"eps": 0.1, "clean_ratio": ratio, "average": average}
    vanilla = VanillaMixing(**params).objective(step := a_step(model, x, y))
    logits = one(torch.cat([x[:clean], step.x_adv]))
    expected = F.cross_entropy(logits, torch.cat([y[:clean], y]), reduction="sum")
    torch.testing.assert_close(vanilla, expected / (10 + clean if average else 10))

    advprop = AdvProp(**params, keep="main" if clean else 1)
    advprop.prepare(other)
    separate = {name: copy.deepcopy(other) for name in ("clean", "adv")}
    loss = advprop.objective(step := a_step(other, x, y))
    with route(separate["adv"], 1):
        expected = F.cross_entropy(separate["adv"](step.x_adv), y, reduction="sum")
    if clean:
        expected = expected + F.cross_entropy(separate["clean"](x[:clean]), y[:clean], reduction="sum")
    torch.testing.assert_close(loss, expected / (10 + clean if average else 10))
    assert int(other[1].num_batches_tracked) == (clean > 0) and int(other[1].auxiliary[0].num_batches_tracked) == 1


class Gradients(Defense):
    """Adds the mean squared input gradients of the clean and of the adversarial loss."""

    def penalty(self, step: Step) -> Tensor:
        return sum((square(made.loss, made.x) for made in (step.clean(), step.adv())), start=torch.zeros(()))


def square(loss: Tensor, x: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean()


@pytest.mark.parametrize("defense", [AdvProp(eps=0.1), AdvProp(eps=0.1, clean_ratio=0.5), VanillaMixing(eps=0.1)])
def test_penalties_of_others_share_the_pass(defense: VanillaMixing) -> None:
    (x, y), model, seen = batch(), network(), []
    stack = Stack([defense, Gradients()])
    stack.prepare(model)
    stack.train_mode()
    before = copy.deepcopy(model)
    model[0].register_forward_pre_hook(lambda layer, inputs: seen.append(len(inputs[0])) if layer.training else None)
    losses = stack.losses(step := a_step(model, x, y))
    whole = defense.clean_ratio == 1
    assert seen == ([20] if whole else [15, 10])
    assert losses.right is not None and len(losses.right) == 10
    # by hand: passes of their own where the statistics are apart, one joint pass where they are not
    clean, adv = x.clone().requires_grad_(), step.x_adv.clone().requires_grad_()  # type: ignore[union-attr]
    if type(defense) is VanillaMixing:
        both = F.cross_entropy(before(torch.cat([clean, adv])), y.repeat(2), reduction="none").split(10)
    else:
        with route(before, 1):
            of_adv = F.cross_entropy(before(adv), y, reduction="none")
        both = (F.cross_entropy(before(clean), y, reduction="none"), of_adv)
    expected = square(both[0], clean) + square(both[1], adv)
    torch.testing.assert_close(losses.penalties["Gradients"], expected.detach(), rtol=1e-4, atol=1e-7)
    (found,) = torch.autograd.grad(losses.total, model[0].weight)
    trained = both[0] if whole else F.cross_entropy(before(x[:5]), y[:5], reduction="none")
    main = trained.sum() / 10 + both[1].mean()
    (by_hand,) = torch.autograd.grad(main + expected, before[0].weight)
    torch.testing.assert_close(found, by_hand, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("which", ["main", 0, 1, 2])
def test_one_of_the_statistics_remains(which: Any) -> None:
    (x, _), model = batch(), apart(convert(network(), 2)).eval()
    with route(model, which):
        expected = model(x)
    plain = keep_only(copy.deepcopy(model), which)
    assert torch.equal(plain(x), expected)
    fresh = network()
    fresh.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(fresh.eval()(x), expected) and type(plain[1]) is nn.BatchNorm2d


def test_what_cannot_remain_is_refused() -> None:
    model = convert(network())
    for which in (2, -1, "all"):
        with pytest.raises(InputError, match=f'"main" or a number from 0 to 1, got {which!r}'):
            keep_only(model, which)  # type: ignore[arg-type]
    assert len(model[1].auxiliary) == 1
    with pytest.raises(InputError, match="nothing to drop"):
        keep_only(network(), 1)
    for keep in ("both", 2, -1, True):
        with pytest.raises(InputError, match='keep to be "main", "all" or a number from 0 to 1'):
            AdvProp(keep=keep)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"clean_ratio > 0, got 0 with keep='main'; keep=1"):
        AdvProp(clean_ratio=0.0)
    with pytest.raises(InputError, match="clean_ratio from 0 to 1, got 2"):
        VanillaMixing(clean_ratio=2)


def test_both_networks_come_from_one_training() -> None:
    data = robplug.dataset("digits", split="train").head(64)
    options: dict[str, Any] = {"epochs": 1, "batch_size": 32}
    whole = robplug.train(network(), data, AdvProp(eps=0.1, keep="all"), **options)
    for which in ("main", 1):
        plain = robplug.train(network(), data, AdvProp(eps=0.1, keep=which), **options)  # type: ignore[arg-type]
        with route(whole, which):
            assert torch.equal(whole(data.x), plain(data.x))
    before = [parameter.detach().clone() for parameter in whole[1].auxiliary.parameters()]
    on = robplug.train(whole, data, AdvProp(eps=0.1, keep="all"), **options)
    assert all(not torch.equal(a, b) for a, b in zip(before, on[1].auxiliary.parameters(), strict=True))
    with pytest.raises(InputError, match="batch norm with 1 auxiliary statistics, got 2"):
        robplug.train(convert(network(), 2), data, AdvProp(), **options)


def test_random_goals_are_wrong_classes_and_approached() -> None:
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), batch(400)
    y, seen = y % 3, []
    attacker = Attacker("i-fgsm", 0.01, 1, 0.01, goal="random")
    change = (attacker.run(a_step(model, x, y)) - x).flatten(1)
    weight = model[1].weight.detach()
    p = model(x).detach().softmax(1)
    for goal in range(3):  # the gradient of the loss towards a goal is sum_c p_c w_c - w_goal
        down = (weight[goal] - p @ weight).sign()
        inside = (x.flatten(1) > 0.01) & (x.flatten(1) < 0.99)
        seen.append(((change.sign() == down) | ~inside).all(1))
    matches = torch.stack(seen, 1)
    assert (matches.sum(1) == 1).all() and not matches[torch.arange(400), y].any()
    first = matches[torch.arange(400), (y + 1) % 3].float().mean()
    assert abs(float(first) - 0.5) < 0.1  # four standard deviations of 400 fair draws


def test_the_mixture_is_the_papers_and_keeps_the_robust_statistics() -> None:
    attacker = Mixture()._attacker()
    assert attacker == Attacker("pgd", 16 / 255, 30, 1 / 255, "random")
    (x, y), model = batch(), network()
    defense = Mixture(eps=0.1, steps=2, step_size=0.05)
    defense.prepare(model)
    defense.objective(a_step(model.train(), x, y))
    with route(model.eval(), 1):
        expected = model(x)
    assert torch.equal(defense.finish(model)(x), expected)
    with pytest.raises(InputError, match="goal to be one of untargeted, random, got 'least-likely'"):
        Mixture(goal="least-likely")  # type: ignore[arg-type]

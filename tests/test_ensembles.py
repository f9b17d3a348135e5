"""Several models as one target."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robplug
from robplug.errors import InputError
from robplug.rng import Rng
from robplug.targets import Target

WEIGHTS = (0.5, 1.0, 2.5)


def net(seed: int, classes: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, classes)).double()


def members() -> list[nn.Module]:
    return [net(seed) for seed in range(3)]


def images(count: int = 7) -> tuple[Tensor, Tensor]:
    torch.manual_seed(9)
    return torch.rand(count, 1, 4, 4, dtype=torch.float64), torch.randint(4, (count,))


def test_logits_and_probabilities_are_averaged() -> None:
    nets, (x, _) = members(), images()
    logits = robplug.target(nets, weights=WEIGHTS).logits(x)
    shares = [weight / 4 for weight in WEIGHTS]
    torch.testing.assert_close(logits, sum(s * own(x) for s, own in zip(shares, nets, strict=True)))
    logs = robplug.target(nets, weights=WEIGHTS, fuse="probabilities").logits(x)
    mean = sum(s * own(x).softmax(1) for s, own in zip(shares, nets, strict=True))
    torch.testing.assert_close(logs.softmax(1), mean)
    torch.testing.assert_close(logs.exp(), mean)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_cross_entropy_of_fused_losses_is_their_mean(reduction: str) -> None:
    """Value and gradient, as any library computes it; fused logits have another one."""
    nets, (x, y) = members(), images()
    x.requires_grad_()
    expected = sum(
        weight / 4 * F.cross_entropy(own(x), y, reduction=reduction) for weight, own in zip(WEIGHTS, nets, strict=True)
    )
    (gradient,) = torch.autograd.grad(expected, x)
    loss = F.cross_entropy(robplug.target(nets, weights=WEIGHTS, fuse="loss").logits(x), y, reduction=reduction)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], gradient)
    other = F.cross_entropy(robplug.target(nets, weights=WEIGHTS).logits(x), y, reduction=reduction)
    assert abs(float((other - expected).detach())) > 0.01


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_fused_losses_stay_finite_in_single_precision(scale: float) -> None:
    """Members that agree wholly, and members that are sure of different classes."""
    nets = [net(0).float(), net(0).float(), net(1).float()]
    for own in nets:
        own[3].weight.data.mul_(scale)
    x, y = images()
    x = x.float().requires_grad_()
    for several in (nets[:2], nets):
        loss = F.cross_entropy(robplug.target(several, fuse="loss").logits(x), y)
        (gradient,) = torch.autograd.grad(loss, x)
        expected = sum(F.cross_entropy(own(x), y) for own in several) / len(several)
        assert bool(gradient.isfinite().all())
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=2e-6)


def test_an_ensemble_of_one_is_that_model() -> None:
    (own, *_), (x, _) = members(), images()
    torch.testing.assert_close(robplug.target([own]).logits(x), own(x), rtol=0, atol=0)
    torch.testing.assert_close(robplug.target([own, net(5)], weights=[1, 0]).logits(x), own(x))
    zero = robplug.target([own, net(5)], weights=[1, 0], fuse="probabilities").logits(x)
    torch.testing.assert_close(zero, own(x).log_softmax(1))


def test_an_ensemble_offers_what_all_its_members_do() -> None:
    scores = robplug.target(net(0), offers="scores", classes=4)
    noisy = robplug.target(net(1), stochastic=True, eot=3, draws=5)
    found = robplug.target([scores, noisy])
    assert (found.offers, found.classes, found.stochastic, found.eot, found.draws) == ("scores", 4, True, 3, 5)
    assert robplug.target([scores, noisy], fuse="loss").classes == 5
    assert robplug.target(("robplug/digits-standard", "robplug/digits-at")).bounds == (0.0, 1.0)
    one = robplug.target(net(0), bounds=(-1, 1))  # options are for models that are no Targets yet
    assert robplug.target([one, net(1)], bounds=(-1, 1)).bounds == (-1.0, 1.0)


@pytest.mark.parametrize(
    ("models", "options", "text"),
    [
        ([], {}, "at least one model"),
        ([net(0), net(1)], {"weights": [1]}, "a weight for each of 2 models"),
        ([net(0), net(1)], {"weights": [1, -1]}, "weights >= 0 with a positive sum"),
        ([net(0), net(1)], {"weights": [0, 0]}, "weights >= 0 with a positive sum"),
        ([net(0), net(1)], {"weights": [1, float("nan")]}, "weights >= 0"),
        ([net(0), net(1)], {"fuse": "votes"}, "fuse to be one of logits, probabilities, loss, got 'votes'"),
        ([robplug.target(net(0), bounds=(0, 2)), net(1)], {}, r"one bounds in an ensemble, got \(0.0, 1.0\), \(0.0, 2"),
        ([robplug.target(net(0), classes=4), robplug.target(net(1), classes=5)], {}, r"\[4, 5\] of them"),
        ([net(0), net(1).to("meta")], {}, "one device in an ensemble, got cpu, meta"),
        ([net(0), "no model"], {}, "no target named"),
    ],
)
def test_what_does_not_fit_is_refused(models: list[Any], options: dict[str, Any], text: str) -> None:
    with pytest.raises(robplug.RobplugError, match=text):
        robplug.target(models, **options)


def test_other_numbers_of_classes_are_seen_at_the_first_pass() -> None:
    with pytest.raises(InputError, match=r"same classes in an ensemble, got \[4, 3\]"):
        robplug.target([net(0), net(1, classes=3)]).logits(images()[0])


def _by_robplug(target: Target, x: Tensor, y: Tensor) -> Tensor:
    attack = robplug.attack("robplug/pgd", random_start=False, early_stop=False, steps=4, step_size=0.05)
    return attack.run(target, x, y, robplug.ThreatModel("linf", 0.1), Rng(0, range(len(x)))).x_adv


def _by_torchattacks(target: Target, x: Tensor, y: Tensor) -> Tensor:
    import torchattacks

    return torchattacks.PGD(target.module, eps=0.1, alpha=0.05, steps=4, random_start=False)(x, y)


def _by_foolbox(target: Target, x: Tensor, y: Tensor) -> Tensor:
    import foolbox

    model = foolbox.PyTorchModel(target.module.eval(), bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfPGD(abs_stepsize=0.05, steps=4, random_start=False)
    return attack.run(model, x, foolbox.criteria.Misclassification(y), epsilon=0.1)


def _by_art(target: Target, x: Tensor, y: Tensor) -> Tensor:
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    shape, loss = tuple(x.shape[1:]), nn.CrossEntropyLoss()
    classes = target.count_classes(x)
    model = PyTorchClassifier(target.module, loss, shape, classes, clip_values=(0, 1), device_type="cpu")
    attack = ProjectedGradientDescent(model, eps=0.1, eps_step=0.05, max_iter=4, verbose=False)
    return torch.from_numpy(attack.generate(x.numpy().astype(np.float32), np.eye(classes)[y.numpy()]))


@pytest.mark.parametrize("fuse", ["logits", "probabilities", "loss"])
@pytest.mark.parametrize("attack", [_by_robplug, _by_torchattacks, _by_foolbox, _by_art])
def test_every_library_attacks_it_as_one_model(attack: Any, fuse: str) -> None:
    nets, (x, y) = [own.float() for own in members()], images()
    x = x.float()
    found = attack(robplug.target(nets, fuse=fuse), x, y)
    expected = x.clone()
    for _ in range(4):
        expected.requires_grad_()
        outs = [own(expected) for own in nets]
        if fuse == "loss":
            loss = sum(F.cross_entropy(out, y, reduction="sum") for out in outs)
        elif fuse == "logits":
            loss = F.cross_entropy(sum(outs) / 3, y, reduction="sum")
        else:
            loss = F.nll_loss((sum(out.softmax(1) for out in outs) / 3).log(), y, reduction="sum")
        step = expected.detach() + 0.05 * torch.autograd.grad(loss, expected)[0].sign()
        expected = (x + (step - x).clamp(-0.1, 0.1)).clamp(0, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

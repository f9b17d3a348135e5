"""Several auxiliary statistics: against plain networks that share all but batch norm."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robplug
from robplug.errors import InputError, RobplugError
from robplug.isolation import seeded_globals
from robplug.rng import Rng
from robplug.step import Step
from robplug_advprop import route
from robplug_advprop.attackers import Attacker
from robplug_advprop.auto_augment import auto_augment
from robplug_advprop.fine_grained import FineGrained

needs_kornia = pytest.mark.skipif(
    importlib.util.find_spec("kornia") is None,
    reason="AutoAugment is not tested: kornia is not installed (robplug-advprop[autoaugment])",
)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 10))


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.rand(count, 1, 8, 8), torch.arange(count) % 10


def a_step(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    return Step(model, x, y, Rng(0, range(len(x))))


def negative(step: Step) -> Tensor:
    return 1 - step.x


@pytest.mark.parametrize("average", [False, True])
def test_each_source_has_statistics_of_its_own(average: bool) -> None:
    (x, y), model = batch(), network()
    defense = FineGrained((negative, 0.1, 0.05), average=average)
    defense.prepare(model)
    for k, layer in enumerate(model[1].auxiliary):
        nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(k))
    frozen = copy.deepcopy(model).train()
    loss = defense.objective(step := a_step(model.train(), x, y))
    weak, strong = Attacker("pgd", 0.05, None, 1 / 255), Attacker("pgd", 0.1, None, 1 / 255)
    with route(frozen, 3):
        x_weak = weak.run(a_step(frozen, x, y))
    with route(frozen, 2):
        x_strong = strong.run(a_step(frozen, x, y))
    expected = torch.zeros(())
    for k, part in enumerate((x, 1 - x, x_strong, x_weak)):
        with route(frozen, k):
            expected = expected + F.cross_entropy(frozen(part), y)
    torch.testing.assert_close(loss, expected / 4 if average else expected)
    assert torch.equal(step.x_adv, x_strong)  # type: ignore[arg-type]
    for (name, one), (_, other) in zip(model.named_buffers(), frozen.named_buffers(), strict=True):
        torch.testing.assert_close(one, other, msg=name)
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(step.clean().loss.mean(), F.cross_entropy(step.clean().logits, y))
    assert len(step.adv().loss) == 6 and not calls


@needs_kornia
def test_auto_augment_is_the_librarys_image_by_image() -> None:
    from kornia.augmentation.auto import AutoAugment

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))
    x, y, defense, seen = torch.rand(6, 3, 8, 8) * 2 - 1, torch.arange(6), FineGrained(("cifar10",)), []
    defense.prepare(model)
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    numbers = torch.get_rng_state()
    step = Step(model.train(), x, y, Rng(0, range(6)), bounds=(-1.0, 1.0))
    defense.objective(step)
    assert torch.equal(torch.get_rng_state(), numbers) and step.x_adv is None
    with seeded_globals(step.rng.batch_seed()):
        policy = AutoAugment("cifar10")
        expected = [policy((image[None] + 1) / 2).clamp(0, 1) * 2 - 1 for image in x]
    assert torch.equal(seen[0], torch.cat([x, *expected])) and not torch.equal(torch.cat(expected), x)
    grey = auto_augment(a_step(model, *batch()), "imagenet")
    assert grey.shape == (6, 1, 8, 8) and grey.min() >= 0 and grey.max() <= 1


def test_a_plan_gives_radii_as_fractions(tmp_path: Any) -> None:
    from robplug.training_plan import load_train_plan

    plan = tmp_path / "train.toml"
    plan.write_text(
        'model = "robplug/resnet20"\ndataset = "digits"\nout = "x"\n'
        '[[defenses]]\nname = "advprop/fine-grained"\nsources = ["1/255", "4/255"]\n'
    )
    (entry,) = load_train_plan(plan).defenses
    assert robplug.defense(entry.name, **entry.params).sources == [1 / 255, 4 / 255]


def test_training_leaves_an_ordinary_network() -> None:
    data = robplug.dataset("digits", split="train").head(64)
    trained = robplug.train(network(), data, FineGrained((0.05, 0.1)), epochs=1, batch_size=32)
    network().load_state_dict(trained.state_dict(), strict=True)
    assert type(trained[1]) is nn.BatchNorm2d


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"sources": ()}, "a list of at least one source"),
        ({"sources": "cifar10"}, "a list of at least one source"),
        ({"sources": (-1.0,)}, "expected eps >= 0"),
        ({"sources": ("randaugment",)}, "a policy of AutoAugment: imagenet, cifar10, svhn, got 'randaugment'"),
        ({"keep": 3}, "a number from 0 to 2, got 3"),
        ({"attack": "fgsm"}, "attack to be one of"),
    ],
)
def test_parameters_are_checked(params: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FineGrained(**params)


@needs_kornia
def test_auto_augment_wants_images() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    defense = FineGrained(("imagenet",))
    defense.prepare(model)
    with pytest.raises(InputError, match=r"images of shape \(N, 1 or 3, H, W\) for AutoAugment, got \(3, 4\)"):
        defense.objective(a_step(model, torch.rand(3, 4), torch.zeros(3, dtype=torch.int64)))


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RobplugError, match=r"pip install 'robplug-advprop\[autoaugment\]'"):
        FineGrained(("imagenet",))

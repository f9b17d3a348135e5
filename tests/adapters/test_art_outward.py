"""robplug's attacks as attacks of ART, with ART's own machinery around them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from art.defences.preprocessor import FeatureSqueezing
from art.defences.trainer import AdversarialTrainer
from art.estimators.classification import BlackBoxClassifier, PyTorchClassifier
from art.exceptions import EstimatorError
from torch import Tensor, nn

from robplug.adapters.art import attack
from robplug.errors import InputError, ThreatError, UnknownNameError
from robplug.isolation import global_numbers
from robplug.plugins import registry
from robplug.rng import Rng
from robplug.types import ThreatModel

HIGH = 255.0
PGD = {"eps": 20.0, "steps": 5}


class Network(nn.Module):
    """A linear model of samples in [0, 255] behind batch norm, whose modes and statistics can be watched."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.norm = nn.BatchNorm2d(1)
        self.linear = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x.float() / HIGH).flatten(1))


def classifier(classes: int = 3, **options: Any) -> PyTorchClassifier:
    network = Network(classes).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    settings = {"input_shape": (1, 4, 4), "nb_classes": classes, "clip_values": (0, HIGH), "device_type": "cpu"}
    return PyTorchClassifier(network, nn.CrossEntropyLoss(), optimizer=optimizer, **settings, **options)


def samples(count: int = 7) -> np.ndarray:
    """Samples far from the box."""
    return np.random.default_rng(0).uniform(100, 150, (count, 1, 4, 4)).astype(np.float32)


def test_x_adv_is_that_of_the_attack_itself_and_has_shape_and_dtype_of_x() -> None:
    estimator, x = classifier(), samples()
    for dtype in (np.float32, np.float64):
        export = attack("robplug/pgd", estimator, random_start=False, batch_size=3, **PGD)
        x_adv = export.generate(x.astype(dtype))
        assert x_adv.shape == x.shape and x_adv.dtype == dtype
        target = registry().target(estimator)
        estimator.model.eval()
        threat = ThreatModel("linf", 20.0, (0.0, HIGH))
        direct = registry().attack("robplug/pgd", steps=5, random_start=False)
        expected = direct.run(target, torch.from_numpy(x), None, threat, Rng(0, range(7))).x_adv
        np.testing.assert_allclose(x_adv, expected.numpy(), rtol=0, atol=1e-5)
    assert attack("robplug/pgd", estimator, **PGD).generate(x[:0]).shape == (0, 1, 4, 4)


def test_network_and_global_numbers_are_left_as_they_were() -> None:
    estimator, x = classifier(), samples()
    network, numbers = estimator.model, global_numbers()
    statistics = network.norm.running_mean.clone()
    attack("robplug/pgd", estimator, **PGD).generate(x)
    assert network.training and network.norm.training
    assert torch.equal(network.norm.running_mean, statistics)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert global_numbers() == numbers
    assert np.array_equal(x, samples())


def test_draws_differ_between_calls_and_not_between_batch_sizes() -> None:
    estimator, x = classifier(), samples()
    settings = {"eps": 20.0, "steps": 1, "step_size": 0.0, "early_stop": False}
    first, *others = (attack("robplug/pgd", estimator, batch_size=size, **settings) for size in (1, 3, 100))
    one, two = first.generate(x), first.generate(x)
    assert not np.array_equal(one, two)
    for other in others:
        assert np.array_equal(other.generate(x), one) and np.array_equal(other.generate(x), two)
    first.set_params(seed=0)
    assert np.array_equal(first.generate(x), one)
    first.set_params(seed=1)
    assert not np.array_equal(first.generate(x), one)


def test_labels_in_all_of_arts_forms() -> None:
    estimator, x = classifier(), samples()
    export = attack("robplug/fgsm", estimator, eps=20.0)
    y = np.array([0, 1, 2, 0, 1, 2, 0])
    results = [
        export.generate(x, labels) for labels in (y, y[:, None], np.eye(3, dtype=np.float32)[y], y.astype(float))
    ]
    assert all(np.array_equal(result, results[0]) for result in results)
    predicted = estimator.predict(x).argmax(1)
    assert np.array_equal(export.generate(x), export.generate(x, predicted))
    assert not np.array_equal(results[0], export.generate(x))


def test_targeted_reaches_the_goals() -> None:
    estimator, x = classifier(), samples()
    goals = (estimator.predict(x).argmax(1) + 1) % 3
    export = attack("robplug/pgd", estimator, eps=200.0, steps=20, targeted=True)
    x_adv = export.generate(x, np.eye(3)[goals])
    assert (estimator.predict(x_adv).argmax(1) == goals).all()
    assert x_adv.min() >= 0 and x_adv.max() <= HIGH
    with pytest.raises(InputError, match="classes to reach"):
        export.generate(x)


def test_norms_by_either_name() -> None:
    estimator, x = classifier(), samples()
    for norm, p in (("l2", 2), (2, 2), (np.inf, np.inf), ("inf", np.inf)):
        change = attack("robplug/fgsm", estimator, eps=30.0, norm=norm).generate(x) - x
        np.testing.assert_allclose(np.linalg.norm(change.reshape(7, -1), ord=p, axis=1), 30.0, rtol=1e-5)


MASK = np.zeros((4, 4))
MASK[:2, 1:] = 1


@pytest.mark.parametrize("mask", [MASK, MASK != 0, np.broadcast_to(MASK, (7, 1, 4, 4))])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_mask_leaves_the_whole_budget_to_what_is_free(mask: np.ndarray, norm: str) -> None:
    """With two classes, a linear model has one best direction; under a mask, that of the free values alone."""
    estimator, x = classifier(classes=2), samples()
    y = estimator.predict(x).argmax(1)
    weight = estimator.model.linear.weight.detach().numpy()
    rise = (weight[1 - y] - weight[y]).reshape(7, 1, 4, 4) * (MASK != 0)
    length = 1.0 if norm == "linf" else np.linalg.norm(rise.reshape(7, -1), axis=1).reshape(7, 1, 1, 1)
    step = (np.sign(rise) if norm == "linf" else rise) / length
    x_adv = attack("robplug/fgsm", estimator, eps=10.0, norm=norm).generate(x, mask=mask)
    np.testing.assert_allclose(x_adv, x + 10.0 * step, rtol=0, atol=1e-4)


def test_mask_with_random_starts_and_decisions_only() -> None:
    estimator, x = classifier(), samples(3)
    exports = [
        attack("robplug/pgd", estimator, restarts=2, **PGD),
        attack("art/hop-skip-jump", estimator, max_iter=2, init_eval=10),
    ]
    for export in exports:
        x_adv = export.generate(x, mask=MASK)
        assert np.array_equal(x_adv[..., MASK == 0], x[..., MASK == 0])
        assert (x_adv[..., MASK == 1] != x[..., MASK == 1]).any()


def test_wrong_arguments_of_generate() -> None:
    estimator, x = classifier(), samples()
    export = attack("robplug/fgsm", estimator, eps=20.0)
    with pytest.raises(InputError, match="mask broadcastable to x of shape"):
        export.generate(x, mask=np.ones((3, 3)))
    with pytest.raises(InputError, match=r"smallest value of -1\.0"):
        export.generate(x, mask=-np.ones((4, 4)))
    with pytest.raises(InputError, match="got patch"):
        export.generate(x, patch=1)
    with pytest.raises(InputError, match=r"y of 7 classes, as numbers or one-hot, got shape \(6,\)"):
        export.generate(x, np.zeros(6, dtype=int))
    with pytest.raises(InputError, match="as numbers"):
        export.generate(x, np.full(7, 0.5))
    with pytest.raises(InputError, match="below 3"):
        export.generate(x, np.full(7, 3))
    with pytest.raises(InputError, match="floating-point"):
        export.generate(x.astype(np.uint8))
    with pytest.raises(InputError, match="inside the bounds"):
        export.generate(x + 200)
    export.norm = "flow"  # as an attack under a norm of flows has it
    with pytest.raises(InputError, match="no mask under the norm flow"):
        export.generate(x, mask=MASK)


def test_parameters_are_those_of_arts_convention() -> None:
    export = attack("robplug/pgd", classifier(), **PGD)
    fields = [field.name for field in dataclasses.fields(registry().attack("robplug/pgd"))]
    assert export.attack_params == ["eps", "norm", "targeted", "batch_size", "seed", "backward", *fields]
    assert "eps=20.0" in repr(export) and "steps=5" in repr(export)
    export.set_params(eps=1.0, steps=9)
    assert np.abs(export.generate(samples()) - samples()).max() <= 1.0 + 1e-4
    for wrong, message in (
        ({"epsilon": 1.0}, "'epsilon'"),
        ({"batch_size": 0}, "batch_size to be an integer >= 1"),
        ({"seed": -1}, "seed to be an integer >= 0"),
    ):
        with pytest.raises(InputError, match=message):
            export.set_params(**wrong)
        export = attack("robplug/pgd", classifier(), **PGD)
    for wrong, message in (
        ({"norm": "l0"}, "norm that robplug/pgd serves"),
        ({"eps": None}, "expected eps, its radius"),
        ({"eps": -1.0}, "eps >= 0"),
        ({"targeted": "yes"}, "targeted='yes'"),
    ):
        with pytest.raises(ThreatError, match=message):
            attack("robplug/pgd", classifier(), **{**PGD, **wrong})
    with pytest.raises(ThreatError, match="no eps: it looks for the smallest distance"):
        attack("art/deep-fool", classifier(), eps=1.0)
    with pytest.raises(ThreatError, match="got targeted=False"):
        attack("art/saliency-map-method", classifier(), targeted=False)
    with pytest.raises(UnknownNameError):
        attack("robplug/pdg", classifier(), eps=1.0)
    with pytest.raises(InputError, match="art/auto with targeted"):
        attack("art/auto", classifier(), eps=1.0)


def test_a_minimal_attack_needs_no_eps() -> None:
    estimator, x = classifier(), samples()
    x_adv = attack("art/deep-fool", estimator).generate(x)
    assert (estimator.predict(x_adv).argmax(1) != estimator.predict(x).argmax(1)).all()


def test_estimator_requirements_are_arts() -> None:
    other = BlackBoxClassifier(lambda x: np.eye(3)[np.zeros(len(x), int)], (1, 4, 4), 3, clip_values=(0, HIGH))
    for name in ("robplug/pgd", "robplug/noise"):
        with pytest.raises(EstimatorError, match="RobplugAttack requires an estimator derived from"):
            attack(name, other, eps=1.0)
    needs = [[base.__name__ for base in attack(name, classifier(), eps=1.0).estimator_requirements]
             for name in ("robplug/pgd", "robplug/noise")]  # fmt: skip
    assert ("LossGradientsMixin" in needs[0], "LossGradientsMixin" in needs[1]) == (True, False)


def test_a_defence_without_gradient() -> None:
    defended, x = classifier(preprocessing_defences=FeatureSqueezing((0, HIGH), bit_depth=2)), samples()
    with pytest.raises(InputError, match='backward="identity"'):
        attack("robplug/pgd", defended, **PGD)
    assert attack("robplug/noise", defended, eps=20.0).generate(x).shape == x.shape
    x_adv = attack("robplug/pgd", defended, backward="identity", eps=100.0, steps=20).generate(x)
    assert (defended.predict(x_adv).argmax(1) != defended.predict(x).argmax(1)).mean() > 0.5


def test_arts_adversarial_trainer_takes_the_attack() -> None:
    estimator, x = classifier(), samples(40)
    y = np.eye(3, dtype=np.float32)[np.arange(40) % 3]
    before = estimator.model.linear.weight.detach().clone()
    export, changes = attack("robplug/pgd", estimator, batch_size=8, **PGD), []
    generate = export.generate

    def watched(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        x_adv = generate(x, y)
        changes.append(np.abs(x_adv - x).max())
        return x_adv

    export.generate = watched
    AdversarialTrainer(estimator, export, ratio=1.0).fit(x, y, batch_size=20, nb_epochs=1)
    assert len(changes) == 2 and all(0 < change <= 20.0 + 1e-4 for change in changes)
    assert not torch.equal(estimator.model.linear.weight, before)
    assert estimator.model.training  # as fit left it: the attack did not get in its way

"""Defences as ART trainers: the estimator's optimizer, loss and preprocessing, and what surgery leaves behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from art.data_generators import NumpyDataGenerator, PyTorchDataGenerator
from art.defences.preprocessor import FeatureSqueezing
from art.defences.preprocessor.preprocessor import PreprocessorPyTorch
from art.defences.trainer import Trainer
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

import robplug
from robplug.adapters.art.training import make_trainer
from robplug.adversarial import AdversarialTraining
from robplug.defenses import Defense, Prepared
from robplug.errors import InputError
from robplug.rng import Rng
from robplug.step import Step
from robplug.zoo import digits_cnn


def net() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))


def arrays(count: int = 30) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.random((count, 3, 2, 2), dtype=np.float32), rng.integers(0, 3, count)


def estimator(model: nn.Module, kind: str = "Adam", **changes: Any) -> PyTorchClassifier:
    options: dict[str, Any] = {
        "loss": nn.CrossEntropyLoss(),
        "input_shape": (3, 2, 2),
        "nb_classes": 3,
        "optimizer": getattr(torch.optim, kind)(model.parameters(), lr=0.01, weight_decay=0.1),
        "clip_values": (0.0, 1.0),
        "device_type": "cpu",
    }
    return PyTorchClassifier(model, **{**options, **changes})


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_close(one: nn.Module, other: nn.Module) -> None:
    for mine, theirs in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs)


class Square(PreprocessorPyTorch):
    """Squares the samples in training only."""

    def __init__(self) -> None:
        super().__init__(device_type="cpu", apply_fit=True, apply_predict=False)

    def forward(self, x: Tensor, y: Any = None) -> tuple[Tensor, Any]:
        return x.square(), y


# against the estimator's own training


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"preprocessing": (0.3, 0.7)},
        {"preprocessing_defences": Square()},
        {"loss": nn.CrossEntropyLoss(label_smoothing=0.2)},
    ],
)
def test_plain_training_is_that_of_the_estimator(changes: dict[str, Any]) -> None:
    x, y = arrays()
    mine, theirs = estimator(net(), **changes), estimator(net(), **changes)
    trainer = make_trainer("robplug/none", mine)
    assert isinstance(trainer, Trainer) and trainer.get_classifier() is mine
    trainer.fit(x, y, batch_size=30, nb_epochs=3)
    theirs.fit(x, np.eye(3, dtype=np.float32)[y], batch_size=30, nb_epochs=3)
    assert_close(mine.model, theirs.model)
    np.testing.assert_allclose(mine.predict(x), theirs.predict(x), rtol=1e-4, atol=1e-6)


def test_one_hot_labels_and_generators_train_alike() -> None:
    x, y = arrays()
    hot = np.eye(3, dtype=np.float32)[y]
    data = torch.utils.data.TensorDataset(torch.from_numpy(x), torch.from_numpy(hot))
    loader = torch.utils.data.DataLoader(data, batch_size=30)
    classifiers = [estimator(net()) for _ in range(4)]
    make_trainer("robplug/none", classifiers[0]).fit(x, y, batch_size=30, nb_epochs=2)
    make_trainer("robplug/none", classifiers[1]).fit(x, hot, batch_size=30, nb_epochs=2)
    make_trainer("robplug/none", classifiers[2]).fit_generator(NumpyDataGenerator(x, hot, batch_size=30), nb_epochs=2)
    make_trainer("robplug/none", classifiers[3]).fit_generator(PyTorchDataGenerator(loader, 30, 30), nb_epochs=2)
    for classifier in classifiers[1:]:
        assert_close(classifiers[0].model, classifier.model)


def test_every_sample_is_used_once_an_epoch_in_a_new_order() -> None:
    batches: list[list[float]] = []

    @dataclass(frozen=True)
    class Watch(Defense):
        def objective(self, step: Step) -> Tensor:
            batches.append(step.x[:, 0, 0, 0].tolist())
            return super().objective(step)

    x, y = arrays()
    trainer = make_trainer(Watch(), estimator(net()))
    trainer.fit(x, y, batch_size=12, nb_epochs=1)
    trainer.fit(x, y, batch_size=12, nb_epochs=1)
    assert [len(batch) for batch in batches] == [12, 12, 6] * 2
    first, second = sum(batches[:3], []), sum(batches[3:], [])  # noqa: RUF017
    assert sorted(first) == sorted(second) == sorted(x[:, 0, 0, 0].tolist()) and first != second


def test_attack_is_on_samples_before_preprocessing() -> None:
    seen: list[Step] = []

    @dataclass(frozen=True)
    class Watch(AdversarialTraining):
        def objective(self, step: Step) -> Tensor:
            loss = super().objective(step)
            seen.append(step)
            return loss

    x, y = arrays()
    classifier = estimator(net(), clip_values=(0.0, 2.0), preprocessing=(1.0, 0.01))
    make_trainer(Watch(eps=0.1, steps=1, step_size=0.1, random_start=False), classifier).fit(x, y, nb_epochs=1)
    assert seen[0].bounds == (0.0, 2.0)
    torch.testing.assert_close(float((seen[0].x_adv - seen[0].x).abs().max()), 0.1, rtol=1e-5, atol=0)


# surgery


@dataclass(frozen=True)
class Scale(Defense):
    """Multiplies the output of the first linear layer by a new parameter."""

    stays: bool = False
    exempt: bool = False

    def prepare(self, model: nn.Module) -> Prepared:
        scale = nn.Parameter(torch.tensor(2.0))
        model[1].register_parameter("scale", scale)
        hook = model[1].register_forward_hook(lambda module, inputs, output: output * module.scale)
        exempt = (scale, model[1].weight) if self.exempt else ()
        return Prepared(hook, parameters=(scale,), no_decay=exempt)

    def penalty(self, step: Step) -> None:
        hooks.append(step.state)

    def finish(self, model: nn.Module) -> nn.Module:
        ends.append((float(model[1].scale.detach()), groups()))
        if not self.stays:
            hooks[-1].remove()
            del model[1].scale
        return model


hooks: list[Any] = []
ends: list[tuple[float, Any]] = []
current: list[torch.optim.Optimizer] = []


def groups() -> list[tuple[int, float]]:
    return [(len(group["params"]), group["weight_decay"]) for group in current[-1].param_groups]


@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
def test_new_parameters_are_trained_by_the_estimators_optimizer_and_gone_afterwards(optimizer: str) -> None:
    x, y = arrays()
    model = net()
    classifier = estimator(model, optimizer)
    current.append(classifier.optimizer)
    classifier.fit(x, y, nb_epochs=2)  # fills the optimizer's state
    parameters = list(model.parameters())
    steps = {id(p): dict(classifier.optimizer.state[p]) for p in parameters}
    make_trainer(Scale(), classifier).fit(x, y, batch_size=10, nb_epochs=2)
    scale, inside = ends[-1]
    assert scale != 2.0 and inside == [(4, 0.1), (1, 0.1)]
    assert groups() == [(4, 0.1)] and classifier.model is model
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert all(id(key) in steps for key in classifier.optimizer.state)
    if optimizer == "Adam":
        assert [int(classifier.optimizer.state[p]["step"]) for p in parameters] == [2 + 6] * 4
    assert classifier.predict(x).shape == (30, 3)
    plain = net()
    plain.load_state_dict(model.state_dict())
    np.testing.assert_allclose(classifier.predict(x), plain(torch.from_numpy(x)).detach().numpy(), rtol=1e-5)
    classifier.fit(x, y, nb_epochs=1)


def test_new_parameters_that_stay_in_the_model_stay_in_the_optimizer() -> None:
    model = net()
    classifier = estimator(model)
    current.append(classifier.optimizer)
    make_trainer(Scale(stays=True), classifier).fit(*arrays(), nb_epochs=1)
    assert groups() == [(4, 0.1), (1, 0.1)]
    assert classifier.optimizer.param_groups[1]["params"][0] is model[1].scale


def test_exemptions_from_weight_decay_end_with_the_training() -> None:
    model = net()
    classifier = estimator(model)
    current.append(classifier.optimizer)
    before = list(classifier.optimizer.param_groups[0]["params"])
    make_trainer(Scale(exempt=True), classifier).fit(*arrays(), nb_epochs=1)
    assert ends[-1][1] == [(3, 0.1), (1, 0.0), (1, 0.0)]
    after = classifier.optimizer.param_groups[0]["params"]
    assert len(classifier.optimizer.param_groups) == 1 and all(a is b for a, b in zip(after, before, strict=True))


def test_a_failing_batch_leaves_estimator_and_optimizer_as_they_were() -> None:
    @dataclass(frozen=True)
    class Fails(Scale):
        def penalty(self, step: Step) -> None:
            super().penalty(step)
            raise ArithmeticError("no")

    model = net().eval()
    before, generator = weights(model), torch.get_rng_state()
    classifier = estimator(model)
    current.append(classifier.optimizer)
    with pytest.raises(ArithmeticError):
        make_trainer(Fails(), classifier).fit(*arrays())
    assert groups() == [(4, 0.1)] and weights(model).keys() == before.keys()
    assert not any(part.training for part in model.modules())
    assert torch.equal(generator, torch.get_rng_state())


# refusals


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"optimizer": None}, "an estimator with an optimizer"),
        ({"clip_values": None}, "one smallest and one largest clip value, got clip_values=None"),
        ({"loss": nn.CrossEntropyLoss(reduction="sum")}, "with reduction='mean'"),
        ({"loss": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))}, "all samples alike"),
        ({"loss": nn.MSELoss()}, "one of the losses CrossEntropyLoss, NLLLoss, MultiMarginLoss"),
        ({"preprocessing_defences": FeatureSqueezing((0.0, 1.0))}, "PyTorch can differentiate, got FeatureSqueezing"),
    ],
)
def test_unfit_estimators_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        make_trainer("robplug/none", estimator(net(), **changes))


def test_unfit_arguments_are_refused() -> None:
    x, y = arrays()
    classifier = estimator(net())
    with pytest.raises(InputError, match="an ART PyTorchClassifier, got a Sequential"):
        make_trainer("robplug/none", net())
    with pytest.raises(InputError, match="parameters only with one name, got eps"):
        make_trainer(["robplug/at"], classifier, eps=0.1)
    with pytest.raises(InputError, match="got 'epsilon'; did you mean eps"):
        make_trainer("robplug/at", classifier, epsilon=0.1)
    with pytest.raises(InputError, match="patience=None in an ART trainer"):
        make_trainer("robplug/at", classifier, patience=2)
    with pytest.raises(InputError, match="batch_size and nb_epochs only, got scheduler; call fit with nb_epochs=1"):
        make_trainer("robplug/none", classifier).fit(x, y, scheduler=None)
    with pytest.raises(InputError, match="one-hot labels, got probabilities"):
        make_trainer("robplug/none", classifier).fit(x, np.full((30, 3), 1 / 3))
    with pytest.raises(InputError, match="at most one defence with an objective"):
        make_trainer(["robplug/at", "robplug/at"], classifier)
    generator = NumpyDataGenerator(x, y, batch_size=30)
    generator._size = None
    with pytest.raises(InputError, match="knows its size"):
        make_trainer("robplug/none", classifier).fit_generator(generator)


# real digits


def test_adversarial_training_makes_an_estimator_robust() -> None:
    train, test = (robplug.dataset("digits", split=split) for split in ("train", "test"))
    threat = robplug.ThreatModel(norm="linf", eps=0.15)
    robust = {}
    for name, params in (("robplug/none", {}), ("robplug/at", {"eps": 0.15, "steps": 3})):
        torch.manual_seed(0)
        model = digits_cnn()
        optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9)
        classifier = estimator(model, optimizer=optimizer, input_shape=(1, 8, 8), nb_classes=10)
        make_trainer(name, classifier, **params).fit(train.x.numpy(), train.y.numpy(), batch_size=32, nb_epochs=6)
        assert (classifier.predict(test.x.numpy()).argmax(1) == test.y.numpy()).mean() > 0.9
        target = robplug.target(model.eval())
        pgd = robplug.attack("robplug/pgd", steps=10)
        x_adv = pgd.run(target, test.x, test.y, threat, Rng(0, range(len(test)))).x_adv
        robust[name] = float((target.predict(x_adv) == test.y).float().mean())
    assert robust["robplug/none"] < 0.25 and robust["robplug/at"] > 0.5, robust

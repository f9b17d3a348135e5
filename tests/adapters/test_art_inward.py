"""ART's attacks on a target, canonical parameters, and estimators as targets."""

from __future__ import annotations

import copy
import importlib.metadata as metadata
from typing import Any

import numpy as np
import pytest
import torch
from art.defences.postprocessor import HighConfidence
from art.defences.preprocessor import FeatureSqueezing, SpatialSmoothing
from art.defences.preprocessor.preprocessor import PreprocessorPyTorch
from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

import robplug
from robplug.adapters.unit_box import ROUNDING, without_rounding
from robplug.canonical import CANONICAL
from robplug.errors import InputError, PlanError, ThreatError
from robplug.isolation import global_numbers
from robplug.plugins import registry
from robplug.rng import Rng
from robplug.targets import Target, from_module
from robplug.types import ThreatModel

CLASSES = 4


def network() -> nn.Sequential:
    """A network whose decisions change from image to image, in eval mode."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(256, CLASSES)
    ).eval()
    with torch.no_grad():
        model[-1].weight *= 5
        model[-1].bias -= model(torch.rand(64, 1, 8, 8)).mean(0)
    return model


class Rescaled(nn.Module):
    """A network for samples inside other bounds."""

    def __init__(self, model: nn.Module, low: float, high: float) -> None:
        super().__init__()
        self.model, self.low, self.width = model, low, high - low

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x.float() - self.low) / self.width)  # ART's FeatureSqueezing makes float64 of float32


def images(count: int = 6) -> Tensor:
    torch.manual_seed(2)
    return torch.rand(count, 1, 8, 8)


def run(target: Target, name: str, x: Tensor, norm: str, eps: float | None, ids: Any = None, **params: Any) -> Tensor:
    attack = registry().attack(f"art/{name}", **params)
    threat = ThreatModel(norm, eps, target.bounds)
    return attack.run(target, x, None, threat, Rng(3, range(len(x)) if ids is None else ids)).x_adv


HSJ = {"max_iter": 2, "init_eval": 10}
BOUNDARY = {"max_iter": 2, "num_trial": 5, "sample_size": 10}


def test_art_passes_by_the_hooks_of_a_sequential_and_the_adapter_does_not() -> None:
    model, calls = network(), {"whole": 0, "child": 0}
    model.register_forward_hook(lambda *_: calls.__setitem__("whole", calls["whole"] + 1))
    model[0].register_forward_hook(lambda *_: calls.__setitem__("child", calls["child"] + 1))
    bare = PyTorchClassifier(model, nn.CrossEntropyLoss(), (1, 8, 8), CLASSES, clip_values=(0, 1))
    bare.predict(images().numpy())
    assert calls == {"whole": 0, "child": 1}
    target = from_module(model, classes=CLASSES)
    run(target, "projected-gradient-descent-pytorch", images(), "linf", 0.1, max_iter=7)
    assert calls["whole"] == calls["child"] - 1 >= 7


def test_model_and_global_numbers_are_left_as_they_were() -> None:
    model = network()
    model[1].train()
    model[0].bias.requires_grad_(False)
    model[0].weight.grad = torch.full_like(model[0].weight, 2.0)
    target, x = from_module(model, classes=CLASSES), images()
    statistics, numbers = model[1].running_mean.clone(), global_numbers()
    for name, norm, eps in (("fast-gradient-method", "l2", 1.0), ("deep-fool", "l2", None), ("square", "linf", 0.1)):
        run(target, name, x, norm, eps)
    assert [part.training for part in model] == [False, True, False, False, False]
    assert not model[0].bias.requires_grad and model[1].weight.requires_grad
    assert torch.equal(model[0].weight.grad, torch.full_like(model[0].weight, 2.0)) and model[1].weight.grad is None
    assert torch.equal(model[1].running_mean, statistics)
    assert global_numbers() == numbers


def test_without_labels_the_predictions_in_eval_mode_are_meant() -> None:
    model, x = network(), images()
    target = from_module(model, classes=CLASSES)
    model[1].running_mean.add_(0.5)
    model[1].running_var.mul_(9.0)
    in_eval, expected = target.predict(x), run(target, "fast-gradient-method", x, "linf", 0.1)
    model.train()
    assert not torch.equal(copy.deepcopy(model)(x).argmax(1), in_eval), "the modes are meant to disagree"
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    assert torch.equal(run(target, "fast-gradient-method", x, "linf", 0.1), expected)


@pytest.mark.parametrize(
    ("name", "params"),
    [("hop-skip-jump", HSJ), ("boundary", BOUNDARY), ("sim-ba", {"max_iter": 20})],
)
def test_a_decision_attack_does_not_depend_on_the_neighbours(name: str, params: dict[str, Any]) -> None:
    target, x = from_module(network(), classes=CLASSES), images()
    together = run(target, name, x, "l2", None, **params)
    alone = [run(target, name, x[i : i + 1], "l2", None, ids=[i], **params) for i in range(len(x))]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together, run(target, name, x, "l2", None, ids=range(10, 16), **params))


def test_a_decision_attack_without_a_start_returns_the_sample() -> None:
    constant = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    with torch.no_grad():
        constant[1].weight.zero_()
    target = from_module(constant, classes=2)
    for name in ("hop-skip-jump", "boundary"):
        assert torch.equal(run(target, name, images(2), "l2", None, init_size=3), images(2))


def test_gradients_are_those_of_single_samples_whatever_the_batch() -> None:
    attack = registry().attack("art/fast-gradient-method")
    target, x = from_module(network(), classes=CLASSES), images()
    y = np.eye(CLASSES, dtype=np.float32)[[0, 1, 2, 3, 0, 1]]
    together = attack._estimator(target, x).loss_gradient(x.numpy(), y)
    alone = attack._estimator(target, x).loss_gradient(x[:1].numpy(), y[:1])
    np.testing.assert_allclose(together[:1], alone, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "norm", "params"),
    [
        ("deep-fool", "l2", {}),
        ("elastic-net", "l1", {"max_iter": 10, "binary_search_steps": 2, "initial_const": 1.0}),
        ("carlini-l-inf-method", "linf", {"max_iter": 3, "learning_rate": 0.1, "initial_const": 0.5}),
    ],
)
def test_classes_made_for_the_unit_box_do_the_same_in_any_box(name: str, norm: str, params: dict[str, Any]) -> None:
    model, x = network(), images(3)
    unit = run(from_module(model, classes=CLASSES), name, x, norm, None, **params)
    wide = from_module(Rescaled(model, -64.0, 192.0), bounds=(-64.0, 192.0), classes=CLASSES)
    found = run(wide, name, x * 256 - 64, norm, None, **params)
    assert (unit - x).abs().max() > 0.01
    torch.testing.assert_close((found + 64) / 256, unit, rtol=0, atol=1e-4)


def test_float64_samples_and_network() -> None:
    target, x = from_module(network().double(), classes=CLASSES), images().double() * 0.999
    goal = (target.predict(x) + 1) % CLASSES
    threat = ThreatModel("l0", None, targeted=True)
    attack = registry().attack("art/saliency-map-method", theta=1.0)
    x_adv = attack.run(target, x, None, threat, Rng(0, range(len(x))), y_goal=goal).x_adv
    assert x_adv.dtype == torch.float64
    changed = (x_adv != x).flatten(1).sum(1)  # float32 and back would have changed all 64
    assert (changed > 0).all() and (changed < 40).all()
    assert run(target, "hop-skip-jump", x, "linf", None, **HSJ).dtype == torch.float64


def test_only_rounding_is_put_back_into_the_box() -> None:
    x_adv = torch.tensor([[1.0 + ROUNDING / 2, -ROUNDING / 2, 0.5, 1.001, -0.1]])
    expected = torch.tensor([[1.0, 0.0, 0.5, 1.001, -0.1]])
    assert torch.equal(without_rounding(x_adv, (0.0, 1.0)), expected)


def test_empty_batch_and_radius_zero_return_the_samples() -> None:
    target, x = from_module(network(), classes=CLASSES), images()
    assert run(target, "deep-fool", x[:0], "l2", None).shape == (0, 1, 8, 8)
    assert torch.equal(run(target, "auto", x, "linf", 0.0), x)


def test_what_an_attack_cannot_do_is_refused() -> None:
    target, x = from_module(network(), classes=CLASSES), images()
    with pytest.raises(ThreatError, match=r"norm that art/deep-fool serves \(l2\), got linf"):
        run(target, "deep-fool", x, "linf", None)
    with pytest.raises(ThreatError, match="got eps=None"):
        run(target, "square", x, "linf", None)
    with pytest.raises(ThreatError, match="art/saliency-map-method serves, got targeted=False"):
        run(target, "saliency-map-method", x, "l0", None)
    flat = from_module(nn.Linear(64, CLASSES), classes=CLASSES)
    with pytest.raises(InputError, match=r"images \(N, C, H, W\) for art/square"):
        run(flat, "square", x.flatten(1), "linf", 0.1)
    scores = from_module(network(), classes=CLASSES, offers="scores")
    with pytest.raises(ThreatError, match="with gradients for art/deep-fool, got one with scores"):
        run(scores, "deep-fool", x, "l2", None)
    labels = from_module(network(), classes=CLASSES, offers="labels")
    with pytest.raises(ThreatError, match="with scores for art/zoo, got one with labels"):
        run(labels, "zoo", x, "l2", None)


def test_what_art_imports_undeclared_is_in_the_extra() -> None:
    arts = [line for line in metadata.requires("adversarial-robustness-toolbox") or () if "extra ==" not in line]
    ours = [line for line in metadata.requires("robplug") or () if 'extra == "art"' in line]
    for package in ("packaging", "multiprocess", "cma"):
        assert not any(line.startswith(package) for line in arts)
        assert any(line.startswith(package) for line in ours)


# canonical parameters


@pytest.mark.parametrize("canonical", CANONICAL)
def test_defaults_of_canonical_attacks_are_parameters_of_art(canonical: str) -> None:
    for norm in registry().specs("norm"):
        if "art" in registry().canonical_libraries(canonical, norm.name) and (canonical, norm.name) != ("apgd", "l1"):
            spec, own = registry().harmonised(canonical, "art", {}, ThreatModel(norm.name, 0.1))
            assert set(own) <= set(spec.params)
            registry().attack(spec.name, **own)


def harmonised(canonical: str, norm: str = "linf", **params: Any) -> dict[str, Any]:
    return registry().harmonised(canonical, "art", params, ThreatModel(norm, 0.1))[1]


def test_canonical_parameters_in_arts_words() -> None:
    pgd = harmonised("pgd", steps=10, restarts=3)
    assert (pgd["max_iter"], pgd["eps_step"], pgd["num_random_init"]) == (10, pytest.approx(0.025), 3)
    assert harmonised("pgd", step_size=0.2, random_start=False)["num_random_init"] == 0
    assert harmonised("pgd", step_size=0.2)["eps_step"] == 0.2
    assert harmonised("mi-fgsm", steps=4) == {"max_iter": 4, "eps_step": pytest.approx(0.025), "decay": 1.0}
    assert harmonised("apgd", restarts=2)["eps_step"] == pytest.approx(0.2)
    assert harmonised("square", queries=100)["max_iter"] == 99
    assert harmonised("deepfool", "l2", overshoot=0.1)["epsilon"] == 0.1


@pytest.mark.parametrize(
    ("canonical", "norm", "params", "message"),
    [
        ("pgd", "linf", {"restarts": 2, "random_start": False}, r"restarts = 2: without random_start"),
        ("bim", "l2", {}, r"'bim' only for linf"),
        ("apgd", "l1", {}, r"norm = 'l1'"),
        ("square", "linf", {"p_init": 1.0}, r"p_init = 1\.0"),
        ("square", "linf", {"queries": 1}, r"queries = 1"),
        ("hop-skip-jump", "l2", {"initial_evals": 300}, r"initial_evals = 300: expected at most max_evals = 200"),
    ],
)
def test_parameters_that_art_cannot_honour(canonical: str, norm: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        harmonised(canonical, norm, **params)


def test_harmonised_one_step_attacks_have_a_closed_form() -> None:
    """On a linear model, far from the box, every step goes along the sign of the difference of two rows."""
    torch.manual_seed(4)
    linear = nn.Linear(12, 2)
    target, x = from_module(linear, classes=2), 0.5 + 0.01 * torch.rand(5, 12)
    y = target.predict(x)
    rise = (linear.weight[1 - y] - linear.weight[y]).sign().detach()
    threat = ThreatModel("linf", 0.1)
    for canonical, params in (("fgsm", {}), ("bim", {"steps": 3}), ("mi-fgsm", {"steps": 3})):
        spec, own = registry().harmonised(canonical, "art", params, threat)
        x_adv = registry().attack(spec.name, **own).run(target, x, y, threat, Rng(0, range(5))).x_adv
        torch.testing.assert_close(x_adv, x + 0.1 * rise)


# estimators as targets


class Blur(PreprocessorPyTorch):
    """A differentiable, non-linear preprocessing."""

    def forward(self, x: Tensor, y: Any = None) -> tuple[Tensor, Any]:
        return nn.functional.avg_pool2d(x.square(), 3, stride=1, padding=1), y


def classifier(high: float = 1.0, **options: Any) -> PyTorchClassifier:
    model = Rescaled(network(), 0.0, high)
    kinds = {"loss": nn.CrossEntropyLoss(reduction="sum"), "input_shape": (1, 8, 8), "nb_classes": CLASSES}
    return PyTorchClassifier(model, clip_values=(0, high), device_type="cpu", **kinds, **options)


DEFENDED = {
    "plain": {},
    "mean and std": {"preprocessing": (0.4, 0.3)},
    "mean and std a channel": {"preprocessing": (np.array([0.4]), np.array([0.3]))},
    "PyTorch": {"preprocessing_defences": [Blur()], "preprocessing": (0.4, 0.3)},
    "numpy": {"preprocessing_defences": FeatureSqueezing((0, 1), bit_depth=3)},
    "numpy, then mean and std": {
        "preprocessing_defences": SpatialSmoothing(channels_first=True),
        "preprocessing": (0.4, 0.3),
    },
}


@pytest.mark.parametrize("kind", DEFENDED)
def test_logits_and_gradients_are_the_estimators_own(kind: str) -> None:
    estimator, x = classifier(**DEFENDED[kind]), images()
    is_numpy = kind.startswith("numpy")
    target = robplug.target(estimator)
    assert (target.bounds, target.classes, target.offers) == (
        (0.0, 1.0),
        CLASSES,
        "scores" if is_numpy else "gradients",
    )
    expected = estimator.predict(x.numpy())
    np.testing.assert_allclose(target.logits(x).detach().numpy(), expected, atol=1e-6)
    if is_numpy:
        leaf = x.clone().requires_grad_()
        target.logits(leaf).sum().backward()
        assert leaf.grad is None
        target = robplug.target(estimator, backward="identity")
        assert target.offers == "gradients"
        np.testing.assert_allclose(target.logits(x).detach().numpy(), expected, atol=1e-6)
    y = target.predict(x)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(target.logits(leaf), y, reduction="sum"), leaf)
    arts = estimator.loss_gradient(x.numpy(), np.eye(CLASSES, dtype=np.float32)[y.numpy()])
    assert np.abs(arts).max() > 0.01
    np.testing.assert_allclose(gradient.numpy(), arts, atol=1e-5)


def test_kornias_median_of_art() -> None:
    pytest.importorskip("kornia")
    from art.defences.preprocessor import SpatialSmoothingPyTorch

    estimator = classifier(preprocessing_defences=SpatialSmoothingPyTorch(channels_first=True))
    logits = robplug.target(estimator).logits(images()).detach().numpy()
    np.testing.assert_allclose(logits, estimator.predict(images().numpy()), atol=1e-6)


def test_estimator_with_other_bounds_and_its_mode() -> None:
    estimator, x = classifier(255.0, preprocessing=(10.0, 2.0)), images() * 255
    expected = estimator.predict(x.numpy())
    estimator.model.train()
    target = robplug.target(estimator)
    assert target.bounds == (0.0, 255.0)
    assert estimator.model.training
    target.module.eval()
    np.testing.assert_allclose(target.logits(x).detach().numpy(), expected, atol=1e-6)


def test_postprocessing_is_part_of_the_logits_and_has_no_gradient() -> None:
    estimator, x = classifier(postprocessing_defences=HighConfidence(cutoff=0.3)), images()
    expected = estimator.predict(x.numpy())
    assert (expected == 0).any() and (expected != 0).any()
    target = robplug.target(estimator)
    assert target.offers == "scores"
    np.testing.assert_allclose(target.logits(x).numpy(force=True), expected, atol=1e-6)
    leaf = x.clone().requires_grad_()
    through = robplug.target(estimator, backward="identity").logits(leaf)
    np.testing.assert_allclose(through.detach().numpy(), expected, atol=1e-6)
    (gradient,) = torch.autograd.grad(through.sum(), leaf)
    plain = images().requires_grad_()
    (without,) = torch.autograd.grad(estimator.model(plain).sum(), plain)
    torch.testing.assert_close(gradient, without)


def test_estimators_that_cannot_be_a_target() -> None:
    settings = {"loss": nn.CrossEntropyLoss(), "input_shape": (1, 8, 8), "nb_classes": CLASSES}
    with pytest.raises(InputError, match="clip_values"):
        robplug.target(PyTorchClassifier(network(), **settings))
    uneven = (np.zeros((1, 8, 8)), np.linspace(1, 2, 64).reshape(1, 8, 8))
    with pytest.raises(InputError, match="one lower and one upper"):
        robplug.target(PyTorchClassifier(network(), clip_values=uneven, **settings))
    smoothed = PyTorchRandomizedSmoothing(network(), clip_values=(0, 1), **settings)
    with pytest.raises(InputError, match="PyTorchRandomizedSmoothing"):
        robplug.target(smoothed)
    with pytest.raises(InputError, match="leave bounds out"):
        robplug.target(classifier(), bounds=(0, 2))
    with pytest.raises(InputError, match="leave backward out"):
        robplug.target(classifier(), backward="identity")
    with pytest.raises(InputError, match="'straight'"):
        robplug.target(classifier(**DEFENDED["numpy"]), backward="straight")

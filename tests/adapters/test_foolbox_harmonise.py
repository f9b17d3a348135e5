"""Canonical parameters in Foolbox's own, and where the two mean different things."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robplug.errors import PlanError
from robplug.plugins import registry
from robplug.rng import Rng
from robplug.targets import from_module
from robplug.types import ThreatModel

WIDE = (-1.0, 3.0)


@pytest.mark.parametrize(
    ("canonical", "params", "threat", "name", "own"),
    [
        ("fgsm", {}, ThreatModel("l1", 0.1), "l1-fast-gradient", {"random_start": False}),
        (
            "pgd",
            {"steps": 5, "step_size": 0.2, "random_start": False},
            ThreatModel("linf", 0.4, WIDE),
            "linf-projected-gradient-descent",
            {"steps": 5, "abs_stepsize": 0.2, "random_start": False},
        ),
        (
            "pgd",
            {"steps": 5},
            ThreatModel("l2", 2.0, WIDE),
            "l2-projected-gradient-descent",
            {"steps": 5, "abs_stepsize": 1.0, "random_start": True},
        ),
        (
            "bim",
            {"steps": 5},
            ThreatModel("linf", 0.2),
            "linf-basic-iterative",
            {"steps": 5, "abs_stepsize": 0.1, "random_start": False},
        ),
        (
            "mi-fgsm",
            {"steps": 5, "decay": 0.9},
            ThreatModel("linf", 0.2),
            "linf-momentum-iterative-fast-gradient-method",
            {"steps": 5, "abs_stepsize": 0.04, "random_start": False, "momentum": 0.9},
        ),
        (
            "deepfool",
            {"steps": 7},
            ThreatModel("linf"),
            "linf-deep-fool",
            {"steps": 7, "overshoot": 0.02, "candidates": None, "loss": "logits"},
        ),
        (
            "cw",
            {"confidence": 1.0},
            ThreatModel("l2"),
            "l2-carlini-wagner",
            {
                "steps": 100,
                "stepsize": 0.01,
                "confidence": 1.0,
                "binary_search_steps": 5,
                "initial_const": 0.01,
                "abort_early": False,
            },
        ),
        ("boundary", {"steps": 9}, ThreatModel("l2"), "boundary", {"steps": 9}),
        (
            "hop-skip-jump",
            {"steps": 9, "initial_evals": 3, "max_evals": 8},
            ThreatModel("linf"),
            "hop-skip-jump",
            {"steps": 9, "initial_gradient_eval_steps": 3, "max_gradient_eval_steps": 8},
        ),
    ],
)
def test_parameters(canonical: str, params: dict, threat: ThreatModel, name: str, own: dict) -> None:
    spec, compiled = registry().harmonised(canonical, "foolbox", params, threat)
    assert spec.name == f"foolbox/{name}"
    assert compiled == own
    registry().attack(spec.name, **compiled)


@pytest.mark.parametrize(
    ("canonical", "params", "norm", "message"),
    [
        ("pgd", {"restarts": 2}, "linf", "foolbox cannot honour restarts = 2: .* set restarts = 1"),
        ("cw", {}, "linf", "foolbox has the attack 'cw' only for l2, and the threat is linf"),
    ],
)
def test_what_the_library_cannot_honour(canonical: str, params: dict, norm: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        registry().harmonised(canonical, "foolbox", params, ThreatModel(norm, 0.1))


def _network() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 24), nn.GELU(), nn.Linear(24, 5)).eval()


def _run(library: str, canonical: str, params: dict, threat: ThreatModel) -> Tensor:
    torch.manual_seed(5)
    x = torch.rand(16, 3, 4, 4)
    target = from_module(_network(), classes=5)
    spec, own = registry().harmonised(canonical, library, params, threat)
    return registry().attack(spec.name, **own).run(target, x, target.predict(x), threat, Rng(0, range(16))).x_adv


@pytest.mark.parametrize("canonical", ["fgsm", "bim"])
def test_fgsm_and_bim_agree_with_torchattacks(canonical: str) -> None:
    threat = ThreatModel("linf", 0.1)
    one, other = (_run(library, canonical, {}, threat) for library in ("foolbox", "torchattacks"))
    assert torch.allclose(one, other, atol=1e-6)


def test_momentum_accumulates_signs_in_foolbox_and_scaled_gradients_in_torchattacks() -> None:
    threat, params = ThreatModel("linf", 0.1), {"steps": 5, "step_size": 0.02}
    for decay, same in ((0.0, True), (1.0, False)):
        results = [
            _run(library, "mi-fgsm", {**params, "decay": decay}, threat) for library in ("foolbox", "torchattacks")
        ]
        assert torch.allclose(*results, atol=1e-6) == same


def test_deepfool_goes_a_little_further_than_torchattacks() -> None:
    """Both linearise over all classes; Foolbox adds 1e-4 to the length of each step, before the overshoot."""
    threat = ThreatModel("l2")
    torch.manual_seed(5)
    x = torch.rand(16, 3, 4, 4)
    results = [_run(library, "deepfool", {}, threat) for library in ("foolbox", "torchattacks")]
    distances = [(result - x).flatten(1).norm(dim=1) for result in results]
    assert torch.allclose(distances[0], distances[1] + 1.02e-4, atol=3e-5)

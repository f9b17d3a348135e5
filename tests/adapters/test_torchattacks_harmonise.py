"""Canonical parameters in torchattacks' own."""

from __future__ import annotations

import pytest

from robplug.errors import PlanError
from robplug.plugins import registry
from robplug.types import ThreatModel

WIDE = (-1.0, 3.0)  # four times as wide as torchattacks' images


@pytest.mark.parametrize(
    ("canonical", "params", "threat", "name", "own"),
    [
        ("fgsm", {}, ThreatModel("linf", 0.1), "fgsm", {}),
        (
            "pgd",
            {"steps": 5, "step_size": 0.2, "random_start": False},
            ThreatModel("linf", 0.4, WIDE),
            "pgd",
            {"steps": 5, "alpha": 0.05, "random_start": False},
        ),
        (
            "pgd",
            {"steps": 5},
            ThreatModel("l2", 2.0, WIDE),
            "pgdl2",
            {"steps": 5, "alpha": 0.25, "random_start": True},
        ),
        ("bim", {"steps": 5}, ThreatModel("linf", 0.2), "bim", {"steps": 5, "alpha": 0.1}),
        (
            "mi-fgsm",
            {"steps": 5, "decay": 0.9},
            ThreatModel("linf", 0.2),
            "mifgsm",
            {"steps": 5, "alpha": 0.04, "decay": 0.9},
        ),
        ("deepfool", {"steps": 7}, ThreatModel("l2"), "deep-fool", {"steps": 7, "overshoot": 0.02}),
        (
            "cw",
            {"binary_search_steps": 1, "initial_const": 16.0},
            ThreatModel("l2", None, WIDE),
            "cw",
            {"steps": 100, "lr": 0.01, "kappa": 0.0, "c": 1.0},
        ),
        (
            "apgd",
            {"steps": 9, "restarts": 3},
            ThreatModel("l2", 0.5),
            "apgd",
            {"steps": 9, "n_restarts": 3, "loss": "ce"},
        ),
        (
            "square",
            {"queries": 50},
            ThreatModel("l2", 0.5),
            "square",
            {"n_queries": 50, "p_init": 0.8, "loss": "margin"},
        ),
    ],
)
def test_parameters(canonical: str, params: dict, threat: ThreatModel, name: str, own: dict) -> None:
    spec, compiled = registry().harmonised(canonical, "torchattacks", params, threat)
    assert spec.name == f"torchattacks/{name}"
    assert compiled == pytest.approx(own) if own else compiled == {}
    registry().attack(spec.name, **compiled)


@pytest.mark.parametrize(
    ("canonical", "params", "norm", "message"),
    [
        ("pgd", {"restarts": 2}, "linf", "torchattacks cannot honour restarts = 2: .* set restarts = 1"),
        ("pgd", {"steps": 0}, "linf", "torchattacks cannot honour steps = 0: expected at least 1"),
        ("bim", {"steps": 0}, "linf", "torchattacks cannot honour steps = 0"),
        ("cw", {}, "l2", "cannot honour binary_search_steps = 5: .* set binary_search_steps = 1"),
        ("cw", {"binary_search_steps": 1, "confidence": 2.0}, "l2", "cannot honour confidence = 2.0"),
        ("pgd", {}, "l1", "torchattacks has the attack 'pgd' only for l2, linf, and the threat is l1"),
        ("boundary", {}, "l2", "torchattacks has the attack 'boundary' not at all"),
    ],
)
def test_what_the_library_cannot_honour(canonical: str, params: dict, norm: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        registry().harmonised(canonical, "torchattacks", params, ThreatModel(norm, 0.1))

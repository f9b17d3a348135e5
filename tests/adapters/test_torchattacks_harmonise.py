"""Canonical parameters in torchattacks' own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robplug.errors import PlanError
from robplug.plugins import registry
from robplug.rng import Rng
from robplug.targets import from_module
from robplug.types import ThreatModel

WIDE = (-1.0, 3.0)  # four times as wide as torchattacks' images
HARD = {"binary_search_steps": 1, "initial_const": 1000.0, "step_size": 0.1}


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
            {"n_queries": 49, "p_init": 0.8, "loss": "margin"},
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
        ("square", {"queries": 1}, "l2", "torchattacks cannot honour queries = 1: expected at least 2"),
        ("cw", {}, "l2", "cannot honour binary_search_steps = 5: .* set binary_search_steps = 1"),
        ("cw", {"binary_search_steps": 1, "confidence": 2.0}, "l2", "cannot honour confidence = 2.0"),
        ("pgd", {}, "l1", "torchattacks has the attack 'pgd' only for l2, linf, and the threat is l1"),
        ("boundary", {}, "l2", "torchattacks has the attack 'boundary' not at all"),
    ],
)
def test_what_the_library_cannot_honour(canonical: str, params: dict, norm: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        registry().harmonised(canonical, "torchattacks", params, ThreatModel(norm, 0.1))


def test_cw_never_moves_a_value_at_the_bounds_and_reads_negative_logits_as_zero() -> None:
    """Two differences in substance from the paper that docs/conformance.md states."""
    spec, own = registry().harmonised("cw", "torchattacks", {**HARD, "steps": 50}, ThreatModel("l2"))
    attack = registry().attack(spec.name, **own)
    x = torch.tensor([[[[0.0, 0.5, 1.0]]]])
    moved = {}
    for name, shift in (("positive", 10.0), ("negative", -10.0)):
        network = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
        with torch.no_grad():
            network[1].weight.copy_(torch.tensor([[1.0, -1.0, -1.0], [-1.0, 1.0, 1.0]]))
            network[1].bias.copy_(torch.tensor([1.6, -1.6]) + shift)
        y = torch.tensor([0])
        moved[name] = attack.run(from_module(network), x, y, ThreatModel("l2"), Rng(0, [0])).x_adv - x
    assert moved["positive"][0, 0, 0, 1] > 0.05
    assert moved["positive"][0, 0, 0, 0] == moved["positive"][0, 0, 0, 2] == 0
    assert (moved["negative"] == 0).all()

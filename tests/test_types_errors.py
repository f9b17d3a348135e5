"""The frozen records, and what the errors say in words and in attributes."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from robplug import errors, types
from robplug.errors import InputError, PlanError, PluginError, RobplugError, StoreError, ThreatError, UnknownNameError
from robplug.types import AttackSpec, ThreatModel


def test_a_threat_model_keeps_what_it_is_given():
    threat = ThreatModel("l2", 0, bounds=(-1, 2), targeted=True)

    assert (threat.norm, threat.eps, threat.bounds, threat.targeted) == ("l2", 0, (-1.0, 2.0), True)
    assert [type(bound) for bound in threat.bounds] == [float, float]
    assert ThreatModel("linf") == ThreatModel("linf", None, (0.0, 1.0), False)
    assert len({ThreatModel("linf", 0.1), ThreatModel("linf", 0.1, bounds=(0, 1))}) == 1


def test_a_radius_is_a_number():
    assert ThreatModel("linf", np.float32(0.5)).eps == 0.5
    with pytest.raises(ThreatError, match=r"expected eps to be a number, got '8/255'; such as 8 / 255, without quotes"):
        ThreatModel("linf", "8/255")  # type: ignore[arg-type]


@pytest.mark.parametrize("eps", [-1e-9, float("nan"), float("inf")])
def test_a_radius_that_makes_no_sense_is_refused(eps):
    with pytest.raises(ThreatError, match=rf"expected eps >= 0 and finite, got {eps}; use None"):
        ThreatModel("linf", eps)


@pytest.mark.parametrize("bounds", [(1, 0), (1, 1), (0, float("inf")), (float("nan"), 1)])
def test_bounds_that_make_no_sense_are_refused(bounds):
    with pytest.raises(ThreatError, match=r"expected bounds \(low, high\) with low < high, got"):
        ThreatModel("linf", 0.1, bounds=bounds)


def test_records_are_frozen():
    records = [value for value in vars(types).values() if isinstance(value, type) and dataclasses.is_dataclass(value)]

    assert len(records) >= 8
    assert [record.__name__ for record in records if not record.__dataclass_params__.frozen] == []
    with pytest.raises(dataclasses.FrozenInstanceError):
        ThreatModel("linf").eps = 1  # type: ignore[misc]


def test_a_spec_takes_keywords_only_and_knows_its_origin():
    assert AttackSpec(name="flow/multi-step", make="a:b").origin == "flow"
    assert types.NormSpec(name="linf", make="a:b").origin == "linf"
    with pytest.raises(TypeError):
        AttackSpec("flow/multi-step", "a:b")  # type: ignore[misc]
    one, other = AttackSpec(name="a/b", make="c:d"), AttackSpec(name="a/b", make="c:d")
    assert one.params == {} and one.params is not other.params


@pytest.mark.parametrize(
    ("error", "text", "attributes"),
    [
        (
            PluginError("robplug-flow", "it is broken", "pip uninstall robplug-flow"),
            "plugin robplug-flow: it is broken; pip uninstall robplug-flow",
            {"distribution": "robplug-flow", "problem": "it is broken", "remedy": "pip uninstall robplug-flow"},
        ),
        (
            UnknownNameError("attack", "a/b", ["a/c", "a/d"], "a is disabled"),
            "no attack named 'a/b'; did you mean a/c or a/d?; a is disabled (see `robplug list attacks`)",
            {"kind": "attack", "name": "a/b", "near": ("a/c", "a/d"), "reason": "a is disabled"},
        ),
        (
            UnknownNameError("norm", "l7"),
            "no norm named 'l7' (see `robplug list norms`)",
            {"near": (), "reason": ""},
        ),
        (
            InputError("steps >= 1", 0, "pass more"),
            "expected steps >= 1, got 0; pass more",
            {"expected": "steps >= 1", "got": 0},
        ),
        (InputError("a cat", "a dog"), "expected a cat, got a dog", {"got": "a dog"}),
        (
            PlanError("plan.toml: seed", "-1 is negative"),
            "plan.toml: seed: -1 is negative",
            {"where": "plan.toml: seed", "problem": "-1 is negative"},
        ),
        (PlanError("", "nothing to do"), "nothing to do", {"where": ""}),
        (StoreError("runs/x", "the disk is full"), "runs/x: the disk is full", {"path": "runs/x"}),
    ],
)
def test_errors_say_it_in_words_and_in_attributes(error, text, attributes):
    assert str(error) == text
    assert {name: getattr(error, name) for name in attributes} == attributes


def test_every_error_is_one_of_robplugs_and_of_the_built_in_kind_that_callers_expect():
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]

    assert len(classes) >= 7
    assert all(issubclass(cls, RobplugError) for cls in classes)
    assert issubclass(InputError, ValueError) and issubclass(ThreatError, ValueError)
    assert issubclass(UnknownNameError, LookupError)
    tree = errors.__doc__ or ""
    assert [cls.__name__ for cls in classes if cls.__name__ not in tree] == []


def test_records_and_errors_import_no_torch():
    modules = "robplug.types, robplug.errors, robplug.plugins, robplug.hookspecs"
    code = f"import {modules}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

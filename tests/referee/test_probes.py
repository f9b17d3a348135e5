"""Probes: what they measure on models with closed forms, and that they disturb nothing and are made once."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import robplug
from robplug.isolation import ModuleState, global_numbers
from robplug.norms import LINF
from robplug.plugins import registry
from robplug.referee.guard import undisturbed
from robplug.referee.probe_measures import OF_MODEL, OF_THREAT, Columns, NotMeasurableError, Part
from robplug.referee.rules_probes import STEPS
from robplug.referee.run import Interrupted, run_plan
from robplug.rng import Rng
from robplug.targets import Target

EPS = 0.1
PLAN: dict[str, Any] = {
    "targets": [{"name": "robplug/digits-standard"}],
    "datasets": [{"name": "digits", "samples": 12}],
    "threats": [{"norm": "linf", "eps": [0.05, EPS]}],
    "attacks": [{"name": "robplug/fgsm"}],
    "probes": 8,
}


class Linear(nn.Module):
    """Logits W (x - 1/2), with a gradient that is reported ``factor`` times as large as it is."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 32))
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1) - 0.5
        return (self.factor * x - ((self.factor - 1) * x).detach()) @ self.weight.T


def part(module: nn.Module, count: int = 24, **options: Any) -> Part:
    """Samples far from the bounds, each of the class that the model gives it."""
    torch.manual_seed(3)
    x = 0.3 + 0.4 * torch.rand(count, 2, 4, 4)
    target = robplug.target(module, **options)
    with torch.no_grad():
        y = target.logits(x).argmax(1)
    assert len(y.unique()) > 1
    return Part(target, x, y, Rng(0, range(count)), LINF, EPS)


def measured(name: str, of: Part) -> Columns:
    with undisturbed(of.target, 0):
        return {**OF_MODEL, **OF_THREAT}[name](of)


@pytest.mark.parametrize("factor", [1.0, 2.0, 0.25])
def test_a_gradient_that_is_too_large_disagrees_by_its_factor(factor: float) -> None:
    found = measured("differences", part(Linear(factor)))["disagreement"]
    assert torch.allclose(found, torch.full_like(found, abs(factor - 1) / (factor + 1)), atol=2e-3)


def test_a_gradient_of_the_other_sign_disagrees_wholly() -> None:
    assert torch.allclose(measured("differences", part(Linear(-1.0)))["disagreement"], torch.ones(24))


def test_any_number_of_steps_reaches_the_optimum_of_a_linear_model() -> None:
    """Of two classes in linf: the margin rises by eps times the l1 norm of the difference of their rows."""
    model = Linear()
    model.weight = nn.Parameter(model.weight[:2])
    of = dataclasses.replace(part(model), eps=0.02)
    with torch.no_grad():
        logits = of.target.logits(of.x)
    best = of.eps * (model.weight[0] - model.weight[1]).detach().abs().sum() - (logits[:, 0] - logits[:, 1]).abs()
    robust = best <= 0
    assert robust.any() and not robust.all()
    found = measured("steps", of)
    for steps in STEPS:
        assert torch.equal(found[f"broken {steps}"], ~robust)
        assert torch.allclose(found[f"margin {steps}"][robust], best[robust], atol=1e-5)


class Gradient(Linear):
    """A linear model with another gradient of its input."""

    def __init__(self, instead: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.instead = instead

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        if x.requires_grad:
            x.register_hook(self.instead)
        return super().forward(x)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("zero", torch.zeros_like),
        ("constant", torch.ones_like),
        ("infinite", lambda gradient: gradient * float("nan")),
        ("", lambda gradient: gradient),
    ],
)
def test_useless_gradients_are_told_apart(name: str, instead: Callable[[Tensor], Tensor]) -> None:
    found = measured("gradients", part(Gradient(instead)))
    for kind in ("zero", "constant", "infinite"):
        assert found[kind].all() if kind == name else not found[kind].any()
    assert not found["underflow"].any(), "the cross-entropy is not blamed where the margin has no gradient either"


@pytest.mark.parametrize(("scale", "underflows"), [(1.0, False), (1e4, True)])
def test_the_softmax_underflows_where_logits_are_large(scale: float, underflows: bool) -> None:
    model = Linear()
    with torch.no_grad():
        model.weight.mul_(scale)
    assert bool(measured("gradients", part(model))["underflow"].float().mean() > 0.9) == underflows


def test_two_calls_are_compared_beyond_rounding() -> None:
    class Noisy(Linear):
        size = 0.0

        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            return logits * (1 + self.size * torch.randn_like(logits))

    noisy = Noisy()
    for size, differs in ((0.0, False), (1e-7, False), (1e-2, True)):
        noisy.size = size
        assert bool(measured("repeat", part(noisy))["differs"].any()) == differs


def test_a_target_without_gradients_says_so() -> None:
    of = part(Linear(), offers="scores")
    for name in ("gradients", "differences"):
        with pytest.raises(NotMeasurableError, match="offers scores and no gradients"):
            measured(name, of)
    assert not measured("repeat", of)["differs"].any() and not measured("noise", of)["infinite"].any()


def test_half_precision_is_too_coarse_for_differences() -> None:
    of = part(Linear())
    half = dataclasses.replace(of, target=robplug.target(Linear().to(torch.bfloat16)))
    with pytest.raises(NotMeasurableError, match="bfloat16 is too coarse"):
        measured("differences", half)


def test_a_declared_substitute_is_not_compared_with_differences() -> None:
    of = part(Linear(), transform=lambda x: x, backward="identity")
    with pytest.raises(NotMeasurableError, match="substitute"):
        measured("differences", of)


def test_an_unbounded_attack_follows_the_bounds() -> None:
    of = part(Linear())
    wide = Part(robplug.target(of.target.module, bounds=(0, 255)), of.x * 255, of.y, of.rng, LINF, EPS * 255)
    assert measured("unbounded", of)["broken"].all() and measured("unbounded", wide)["broken"].all()


def test_a_model_in_training_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Dropout(0.5), Linear())
    model[0].eval()
    target: Target = robplug.target(model)
    of = part(model)
    before, numbers = ModuleState(target.module, strict=True), global_numbers()
    for name in (*OF_MODEL, "noise", "steps"):
        measured(name, of)
    assert before.restore() == [] and global_numbers() == numbers


# in a run


def probes_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted((path / "probes").glob("*.json"))]


def test_probes_are_stored_once_and_hold_what_json_can(tmp_path: Path) -> None:
    first = robplug.evaluate(PLAN, out=tmp_path).summary()
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "probes").iterdir()}
    assert [probe["norm"] for probe in sorted(probes_of(tmp_path), key=str)].count(None) == 1 and len(stamps) == 2
    (threat,) = (probe for probe in probes_of(tmp_path) if probe["norm"])
    assert threat["eps"] == EPS and threat["samples"] == list(range(8))
    more = {**PLAN, "attacks": [{"name": "robplug/fgsm"}, {"name": "robplug/pgd", "steps": 2}]}
    robplug.evaluate(more, out=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "probes").iterdir()} == stamps
    assert len(first.diagnoses[0].steps) == 7
    robplug.evaluate({**more, "probes": 9}, out=tmp_path)
    assert len(probes_of(tmp_path)) == 4


def test_chunks_change_no_measurement(tmp_path: Path) -> None:
    for chunk in (3, 64):
        robplug.evaluate({**PLAN, "chunk": chunk}, out=tmp_path / str(chunk))
    few, all_at_once = (sorted(probes_of(tmp_path / size), key=lambda one: str(one["norm"])) for size in ("3", "64"))
    for one, other in zip(few, all_at_once, strict=True):
        assert one["key"] != other["key"] and one["columns"].keys() == other["columns"].keys()
        for name, values in one["columns"].items():
            assert values == pytest.approx(other["columns"][name], abs=1e-4), name


def test_no_probes_without_samples_or_radius(tmp_path: Path) -> None:
    robplug.evaluate({**PLAN, "probes": 0}, out=tmp_path / "off")
    assert not (tmp_path / "off" / "probes").exists()
    found = robplug.evaluate({**PLAN, "targets": [wrong(tmp_path)]}, out=tmp_path / "wrong").summary().diagnoses[0]
    assert "no sample is classified correctly" in found.unchecked["two identical calls differ"]


def wrong(folder: Path) -> dict[str, Any]:
    """A target that gets everything wrong."""
    (folder / "wrong.py").write_text(
        "import torch\nfrom robplug.zoo import digits_standard\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.inner = digits_standard()\n"
        "    def forward(self, x):\n        return -self.inner(x)\n"
    )
    return {"name": "wrong", "make": f"{folder / 'wrong.py'}:Net"}


def test_a_probe_that_raises_is_a_line_and_no_crash(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(
        "import torch\nfrom robplug.zoo import digits_standard\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.inner = digits_standard()\n"
        "    def forward(self, x):\n"
        "        if x.requires_grad:\n            raise ValueError('not today')\n"
        "        return self.inner(x)\n"
    )
    plan = {**PLAN, "targets": [{"name": "odd", "make": f"{tmp_path / 'odd.py'}:Net"}]}
    found = (
        robplug.evaluate({**plan, "attacks": [{"name": "robplug/noise"}]}, out=tmp_path / "out").summary().diagnoses[0]
    )
    assert found.unchecked["an unbounded attack fails"] == "could not run: ValueError: not today"
    assert "two identical calls differ" in found.checked


def test_a_norm_without_a_steepest_direction_has_noise_alone(tmp_path: Path) -> None:
    plan = {**PLAN, "threats": [{"norm": "l0", "eps": 3}], "attacks": [{"name": "robplug/noise"}]}
    robplug.evaluate(plan, out=tmp_path)
    (threat,) = (probe for probe in probes_of(tmp_path) if probe["norm"])
    assert "steepest" in threat["failed"]["steps"] and len(threat["columns"]["noise.broken"]) == 8


class Interrupting:
    """Presses Ctrl-C when the first probe begins."""

    def __init__(self) -> None:
        self.labels: list[str] = []

    def begin(self, samples: int) -> None: ...

    def advance(self, label: str, samples: int, done_before: bool) -> None:
        self.labels.append(label)
        if label.startswith("probing") and sum(one.startswith("probing") for one in self.labels) == 1:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_stops_between_probes_and_the_next_run_goes_on(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run_plan(PLAN, registry(), out=tmp_path, progress=Interrupting())
    assert len(probes_of(tmp_path)) == 1
    robplug.evaluate(PLAN, out=tmp_path)
    assert len(probes_of(tmp_path)) == 2


def test_a_probe_that_killed_the_process_twice_is_given_up(tmp_path: Path) -> None:
    robplug.evaluate(PLAN, out=tmp_path)
    for path in (tmp_path / "probes").glob("*.json"):
        path.unlink()
        path.with_suffix("").write_bytes(struct.pack("<3q", 2, 3, 3))
    found = robplug.evaluate(PLAN, out=tmp_path).summary().diagnoses[0]
    assert "killed twice at the same point" in found.unchecked["two identical calls differ"]
    assert sorted(path.suffix for path in (tmp_path / "probes").iterdir()) == [".json", ".json"]

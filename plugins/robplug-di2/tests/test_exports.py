"""Each attack as an attack of ART, Foolbox and torchattacks, and in a plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import robplug
from robplug.rng import Rng
from robplug.types import ThreatModel

SMALL = {"ratio": 1.5, "resize_back": True}
PARAMS: dict[str, dict[str, Any]] = {
    "di2/di2-fgsm": SMALL,
    "di2/m-di2-fgsm": SMALL,
    "di2/d-cw": {**SMALL, "steps": 10, "step_size": 0.03, "binary_search_steps": 3, "initial_const": 1.0},
}
EPS = 0.1


def digits() -> tuple[nn.Module, Tensor, Tensor]:
    data = robplug.dataset("digits", split="test").head(12)
    return robplug.target("robplug/digits-standard").module, data.x, data.y


def radius(name: str) -> dict[str, float]:
    return {} if name == "di2/d-cw" else {"eps": EPS}


def own(name: str) -> Tensor:
    """Returns what the attack itself gives for the streams of an export's first call."""
    model, x, y = digits()
    threat = ThreatModel("l2" if name == "di2/d-cw" else "linf", **radius(name))
    rng = Rng(0, ()).next_call(len(x))
    x_adv = robplug.attack(name, **PARAMS[name]).run(robplug.target(model), x, y, threat, rng).x_adv
    assert (model(x_adv).argmax(1) != y).any()
    return x_adv


@pytest.mark.parametrize("name", PARAMS)
def test_in_torchattacks(name: str) -> None:
    pytest.importorskip("torchattacks")
    model, x, y = digits()
    attack = robplug.adapters.torchattacks.attack(name, model, **radius(name), **PARAMS[name])
    torch.testing.assert_close(attack(x, y), own(name))


@pytest.mark.parametrize("name", PARAMS)
def test_in_foolbox(name: str) -> None:
    foolbox = pytest.importorskip("foolbox")
    model, x, y = digits()
    fmodel = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    raw, _, is_adv = robplug.adapters.foolbox.attack(name, **PARAMS[name])(fmodel, x, y, epsilons=[EPS])
    torch.testing.assert_close(raw[0], own(name))
    assert not (is_adv[0] & (model(raw[0]).argmax(1) == y)).any()


@pytest.mark.parametrize("name", PARAMS)
def test_in_art(name: str) -> None:
    pytest.importorskip("art")
    from art.estimators.classification import PyTorchClassifier

    model, x, y = digits()
    options = {"clip_values": (0.0, 1.0), "device_type": "cpu"}
    classifier = PyTorchClassifier(model, nn.CrossEntropyLoss(), (1, 8, 8), 10, **options)
    attack = robplug.adapters.art.attack(name, classifier, **radius(name), **PARAMS[name])
    torch.testing.assert_close(torch.from_numpy(attack.generate(x.numpy(), y.numpy())), own(name))


def test_in_a_plan_chunks_change_nothing(tmp_path: Any) -> None:
    """The shared draws do not know of batches, so that the verdicts do not, either."""
    plan = {
        "targets": [{"name": "robplug/digits-standard"}],
        "datasets": [{"name": "digits", "samples": 24}],
        "threats": [{"norm": "linf", "eps": EPS}, {"norm": "l2", "eps": 1.0}],
        "attacks": [
            {"name": name, "norms": ["l2" if name == "di2/d-cw" else "linf"], **params}
            for name, params in PARAMS.items()
        ],
    }
    runs = [robplug.evaluate({**plan, "chunk": chunk}, out=tmp_path / str(chunk)).rows() for chunk in (24, 7)]
    for one, other in zip(*runs, strict=True):
        assert one["status"] == other["status"] in {"misclassified", "robust", "broken"}
    assert any(row["status"] == "broken" for row in runs[0])

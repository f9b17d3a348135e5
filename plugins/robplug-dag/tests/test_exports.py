"""The attack on detectors as an attack of ART; libraries that know classification alone say so."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from art.attacks.attack import EvasionAttack
from art.estimators.classification import PyTorchClassifier
from art.exceptions import EstimatorError
from torch import nn

from robplug.adapters import art, foolbox, torchattacks
from robplug.errors import ThreatError
from robplug.plugins import registry
from robplug.rng import Rng
from robplug.types import ThreatModel
from robplug.vision.shapes import shapes
from robplug_dag import perceptibility
from robplug_dag.attack import DetectionAdversary

sys.path.insert(0, str(Path(__file__).parents[3] / "tests" / "vision"))
from torchvision_nets import network

HIGH = 255.0


def classifier() -> PyTorchClassifier:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    return PyTorchClassifier(model, nn.CrossEntropyLoss(), (3, 2, 2), 3, clip_values=(0, 1), device_type="cpu")


@pytest.mark.parametrize("kind", ["faster-rcnn", "retinanet"])
def test_art_estimators_are_attacked_as_torchvisions_detectors(kind: str) -> None:
    from art.estimators.object_detection import PyTorchFasterRCNN, PyTorchObjectDetector

    make = PyTorchFasterRCNN if kind == "faster-rcnn" else PyTorchObjectDetector
    model = network(kind)
    made = make(model, input_shape=(3, 64, 64), clip_values=(0, HIGH), device_type="cpu")
    data = shapes(samples=3, contrast=0.3)
    boxes = data.labels("detection")
    y = [{"boxes": r[:, :4].numpy(), "labels": r[:, 4].numpy()} for r in (one[one[:, 4] != -1] for one in boxes)]
    settings: dict[str, Any] = {"steps": 5, "gamma": 2.0, "rule": "goal", "positive": 1e-3, "permutation": (1, 2, 3, 0)}
    export = art.attack("dag/detection", made, batch_size=2, **settings)
    assert isinstance(export, EvasionAttack) and export.norm == "dag/perceptibility" and export.eps is None
    x = (HIGH * data.x).numpy()
    x_adv = export.generate(x, y)
    threat = ThreatModel("linf", None, (0.0, HIGH))
    alone = DetectionAdversary(**settings).run(registry().target(made), HIGH * data.x, boxes, threat, Rng(0, range(3)))
    np.testing.assert_allclose(x_adv, alone.x_adv.numpy(), rtol=0, atol=0.02)
    p = perceptibility(torch.from_numpy(x_adv - x), bounds=(0, HIGH))
    assert (p > 0).any() and np.abs(x_adv - x).max() <= 10.01
    assert (model.rpn.nms_thresh if kind == "faster-rcnn" else model.nms_thresh) in (0.5, 0.7)


def test_estimators_of_other_tasks_are_refused() -> None:
    with pytest.raises(
        EstimatorError, match=r"RobplugAttack requires an estimator derived from .*PyTorchObjectDetector"
    ):
        art.attack("dag/detection", classifier())
    with pytest.raises(ThreatError, match=r"classification and detection, all that ART has models for, got dag/segm"):
        art.attack("dag/segmentation", classifier())


@pytest.mark.parametrize("name", ["dag/segmentation", "dag/detection"])
def test_foolbox_and_torchattacks_know_classification_alone(name: str) -> None:
    task = name.partition("/")[2]
    with pytest.raises(
        ThreatError, match=f"classification, all that Foolbox has models for, got {name} on {task}; use"
    ):
        foolbox.attack(name)
    with pytest.raises(
        ThreatError, match=f"classification, all that torchattacks has models for, got {name} on {task}"
    ):
        torchattacks.attack(name, nn.Identity())

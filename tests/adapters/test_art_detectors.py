"""robplug's attacks as attacks of ART on ART's object detectors, around torchvision's Faster R-CNN."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from art.exceptions import EstimatorError

from robplug.adapters.art import attack
from robplug.errors import InputError, ThreatError
from robplug.plugins import registry
from robplug.rng import Rng
from robplug.types import ThreatModel
from robplug.vision.shapes import shapes

sys.path.insert(0, str(Path(__file__).parents[1] / "vision"))
from torchvision_nets import network

HIGH, EPS = 255.0, 8.0


def estimator() -> Any:
    from art.estimators.object_detection import PyTorchFasterRCNN

    return PyTorchFasterRCNN(network("faster-rcnn"), input_shape=(3, 64, 64), clip_values=(0, HIGH), device_type="cpu")


def scene() -> tuple[np.ndarray, list[dict[str, np.ndarray]], torch.Tensor]:
    """Returns images, labels as ART has them, and as robplug has them."""
    data = shapes(samples=3, contrast=0.3)
    boxes = data.labels("detection")
    boxes[1] = -1  # an image without objects
    y = []
    for rows in boxes:
        rows = rows[rows[:, 4] != -1]
        y.append({"boxes": rows[:, :4].numpy(), "labels": rows[:, 4].long().numpy(), "scores": np.ones(len(rows))})
    return (HIGH * data.x).numpy(), y, boxes


def test_x_adv_is_that_of_the_attack_itself() -> None:
    made, (x, y, boxes) = estimator(), scene()
    export = attack("robplug/fgsm", made, eps=EPS)
    x_adv = export.generate(x, y)
    assert x_adv.shape == x.shape and x_adv.dtype == np.float32
    direct = registry().attack("robplug/fgsm")
    torch.manual_seed(0)
    threat = ThreatModel("linf", EPS, (0.0, HIGH))
    expected = direct.run(registry().target(made), torch.from_numpy(x), boxes, threat, Rng(0, range(3))).x_adv
    torch.manual_seed(0)
    np.testing.assert_allclose(export.generate(x, y), expected.numpy(), rtol=0, atol=1e-3)
    assert 0 < np.abs(x_adv - x).max() <= EPS * (1 + 1e-6) and x_adv.min() >= 0 and x_adv.max() <= HIGH
    own = attack("robplug/noise", made, eps=EPS).generate(x)
    assert own.shape == x.shape and not np.array_equal(own, x)


def test_the_estimator_is_left_as_it_was() -> None:
    made, (x, y, _) = estimator(), scene()
    model = made.model
    before = [part.training for part in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    predicted = made.predict(x)
    attack("robplug/pgd", made, eps=EPS, steps=2).generate(x, y)
    assert before[0] == [part.training for part in model.modules()]
    assert all(torch.equal(before[1][name], tensor) for name, tensor in model.state_dict().items())
    assert all(np.array_equal(one["boxes"], two["boxes"]) for one, two in zip(predicted, made.predict(x), strict=True))


BOX = {"boxes": np.zeros((1, 4)), "labels": np.ones(1)}


@pytest.mark.parametrize(
    ("y", "words"),
    [
        ([BOX, BOX], "y of 3 dicts, one for each image, got 2"),
        ([{"boxes": BOX["boxes"]}] * 3, r"dicts with boxes and labels, got \['boxes'\]"),
        (np.zeros(3), "dicts with boxes and labels, got 0.0"),
        ([{**BOX, "labels": np.ones(2)}] * 3, r"boxes of shape \(2, 4\), one for each label, got \(1, 4\)"),
        ([{**BOX, "boxes": np.zeros((0, 4))}] * 3, r"boxes of shape \(1, 4\).*got \(0, 4\)"),
        ([BOX] * 3, "x1 < x2 and y1 < y2, got"),
    ],
)
def test_labels_that_are_none_of_arts_are_refused(y: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        attack("robplug/fgsm", estimator(), eps=EPS).generate(scene()[0], y)


def test_what_an_attack_on_a_detector_cannot_do_is_refused() -> None:
    made, (x, y, _) = estimator(), scene()
    with pytest.raises(InputError, match="no mask for detection"):
        attack("robplug/fgsm", made, eps=EPS).generate(x, y, mask=np.ones((64, 64)))
    with pytest.raises(ThreatError, match="no goals for detection"):
        attack("robplug/fgsm", made, eps=EPS, targeted=True).generate(x, y)
    with pytest.raises(EstimatorError, match="PyTorchClassifier"):
        attack("robplug/cw", made)

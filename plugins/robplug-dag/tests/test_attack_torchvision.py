"""The attack on torchvision's detectors leaves all of them as it was."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import robplug
from robplug.rng import Rng
from robplug.types import ThreatModel
from robplug.vision.shapes import shapes
from robplug_dag.attack import DetectionAdversary, targets

sys.path.insert(0, str(Path(__file__).parents[3] / "tests" / "vision"))
from torchvision_nets import network

KINDS = ("faster-rcnn", "retinanet", "ssd")
ANY = {"rule": "goal", "positive": 1e-3}
"""With which untrained detectors, sure of nothing or of the background, have targets."""


def scene() -> tuple[Tensor, Tensor]:
    data = shapes(samples=3, contrast=0.3)
    return data.x, data.labels("detection")


def state(model: nn.Module) -> dict[str, Any]:
    """Returns modes, tensors and plain numbers of every part, such as the thresholds of proposals and detections."""
    found: dict[str, Any] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, part in model.named_modules():
        plain = {key: value for key, value in vars(part).items() if isinstance(value, bool | int | float)}
        found |= {f"{name}.{key}": value for key, value in plain.items()}
    return found


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key]
        for key, value in one.items()
    )


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_thresholds_modes_and_buffers_are_as_before(kind: str, train: bool) -> None:
    model, (x, y) = network(kind).train(train), scene()
    target, before = robplug.target(model), state(model)
    places = [key for key in before if "nms_thresh" in key]
    assert places and (kind != "faster-rcnn" or len(places) == 2) and before[".training"] is train
    during: list[bool] = []
    model.backbone.register_forward_hook(lambda *_: during.append(same(before, state(model))))
    found = DetectionAdversary(steps=3, **ANY).run(target, x, y, ThreatModel("linf"), Rng(0, range(3)))
    assert found.trace is not None and (found.trace[:, 0] > 0).any() and not torch.equal(found.x_adv, x)
    assert same(before, state(model)) and (kind != "faster-rcnn" or not all(during))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("calls", [1, 3])
def test_an_exception_in_between_changes_nothing(kind: str, calls: int) -> None:
    model, (x, y) = network(kind), scene()
    target, seen = robplug.target(model), []

    def fails(*_: Any) -> None:
        seen.append(target.module.nms_threshold)
        if len(seen) > calls:
            raise KeyboardInterrupt

    before = state(model)
    handle = model.backbone.register_forward_hook(fails)
    threshold = target.module.nms_threshold
    with pytest.raises(KeyboardInterrupt):
        DetectionAdversary(steps=3, **ANY).run(target, x, y, ThreatModel("linf"), Rng(0, range(3)))
    assert seen[-1] == 0.9 and target.module.nms_threshold == threshold == 0.7
    handle.remove()
    assert same(before, state(model))


@pytest.mark.parametrize("kind", ["faster-rcnn", "ssd"])
def test_what_stands_for_an_object_is_its_class_no_more(kind: str) -> None:
    """The positive proposals of the clean image, looked at again in the perturbed one."""
    model, (x, y) = network(kind), scene()
    target, attack = robplug.target(model), DetectionAdversary(steps=40, gamma=0.01)
    found = attack.run(target, x, y, ThreatModel("linf"), Rng(0, range(3)))
    target.module.nms_threshold = 0.9
    with torch.no_grad():
        made = target.proposals(x)
        labels = targets(made.boxes, made.logits, made.valid, y, 0.1)
        before, after = (target.rescore(images, made).argmax(2) for images in (x, found.x_adv))
    active, left = (((labels_now == labels) & (labels > 0)).sum(1) for labels_now in (before, after))
    assert found.trace is not None and torch.equal(found.trace[:, 0].long(), active) and active.any()
    assert found.claim is not None and found.claim.any()
    assert torch.equal(found.claim, (labels > 0).any(1) & (left == 0))

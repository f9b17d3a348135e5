"""torchvision's networks as targets, against what the networks say themselves."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import robplug
from robplug.errors import InputError
from robplug.tasks import overlap
from robplug.vision.protocol import Detector
from robplug.vision.shapes import shapes

sys.path.insert(0, str(Path(__file__).parent))
from torchvision_nets import CLASSES, network

KINDS = ("faster-rcnn", "retinanet", "ssd")


def images() -> tuple[Tensor, Tensor]:
    data = shapes(samples=3, contrast=0.3)
    return data.x, data.labels("detection")


def state(model: nn.Module) -> list[object]:
    return [part.training for part in model.modules()] + [tensor.clone() for tensor in model.state_dict().values()]


def same(one: list[object], other: list[object]) -> bool:
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(one, other, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_detections_are_the_models_own(kind: str) -> None:
    model, (x, _) = network(kind), images()
    target = robplug.target(model)
    assert target.task == "detection" and isinstance(target.module, Detector)
    found = target.detections(x)
    own = model(list(x))
    assert found.shape == (3, max(len(one["boxes"]) for one in own), 6) and found.shape[1] > 0
    for rows, one in zip(found, own, strict=True):
        count = len(one["boxes"])
        assert torch.equal(rows[:count, :4], one["boxes"]) and torch.equal(rows[:count, 4], one["scores"])
        assert torch.equal(rows[:count, 5].long(), one["labels"]) and (rows[count:] == -1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_the_models_own_for_each_image(kind: str) -> None:
    model, (x, y) = network(kind), images()
    y[2] = -1.0  # an image without objects
    before = state(model)
    torch.manual_seed(5)
    losses = robplug.target(model).losses(x.requires_grad_(), y)
    assert same(before, state(model))
    torch.manual_seed(5)
    model.train()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()
    for image, rows, loss in zip(x, y, losses, strict=True):
        rows = rows[rows[:, 4] != -1]
        own = model([image], [{"boxes": rows[:, :4], "labels": rows[:, 4].long()}])
        torch.testing.assert_close(loss, sum(own.values()))
    (gradient,) = torch.autograd.grad(losses.sum(), x)
    assert gradient[:2].flatten(1).abs().sum(1).gt(0).all()  # SSD counts nothing of the last


def test_proposals_of_a_two_stage_detector_are_what_its_parts_say() -> None:
    model, (x, _) = network("faster-rcnn"), images()
    seen: dict[str, object] = {}
    model.rpn.register_forward_hook(lambda part, inputs, output: seen.update(boxes=output[0]))
    model.roi_heads.box_predictor.register_forward_hook(lambda part, inputs, output: seen.update(logits=output[0]))
    model(list(x))
    boxes, logits = seen["boxes"], seen["logits"]
    found = robplug.target(model).proposals(x)
    assert torch.equal(found.valid.sum(1), torch.tensor([len(part) for part in boxes]))
    torch.testing.assert_close(found.logits[found.valid], logits)
    torch.testing.assert_close(found.boxes[found.valid], torch.cat(boxes))


@pytest.mark.parametrize("kind", ["retinanet", "ssd"])
def test_proposals_of_a_one_stage_detector_are_its_moved_anchors(kind: str) -> None:
    model, (x, _) = network(kind), images()
    seen: dict[str, Tensor] = {}
    model.head.register_forward_hook(lambda part, inputs, output: seen.update(output))
    target = robplug.target(model)
    target.module.nms_threshold = 1.0  # nothing overlaps by more: every anchor is a proposal
    found = target.proposals(x)
    assert found.valid.all() and found.logits.shape == seen["cls_logits"].shape
    own = seen["cls_logits"].clone()
    own[..., 0] = 0.0 if kind == "retinanet" else own[..., 0]
    for image in range(3):
        order = own[image].softmax(1)[:, 0].sort(stable=True)
        torch.testing.assert_close(found.logits[image].softmax(1)[:, 0], order.values)
        assert {tuple(row) for row in found.logits[image].tolist()} == {tuple(row) for row in own[image].tolist()}
    # a detection is one of these boxes
    boxes = target.detections(x)
    for image in range(3):
        real = boxes[image][boxes[image, :, 5] != -1][:, :4]
        assert len(real) and overlap(real[None], found.boxes[image : image + 1])[0].amax(1).gt(0.999).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_threshold_of_proposals_can_be_set_and_set_back(kind: str) -> None:
    model, (x, _) = network(kind), images()
    target, before = robplug.target(model), state(model)
    old, first = target.module.nms_threshold, target.proposals(x)
    target.module.nms_threshold = 0.1
    assert int(target.proposals(x).valid.sum()) < int(first.valid.sum())
    target.module.nms_threshold = old
    torch.testing.assert_close(target.proposals(x).boxes, first.boxes)
    assert old == 0.7 and same(before, state(model))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_proposals_have_a_gradient(kind: str) -> None:
    x = images()[0].requires_grad_()
    found = robplug.target(network(kind)).proposals(x)
    (gradient,) = torch.autograd.grad(found.logits[found.valid].sum(), x)
    assert gradient.flatten(1).abs().sum(1).gt(0).all() and not found.boxes.requires_grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [64, 128])
def test_the_same_proposals_are_scored_again(kind: str, size: int) -> None:
    x = images()[0]
    target = robplug.target(network(kind, size))
    found = target.proposals(x)
    torch.testing.assert_close(target.module.rescore(x, found)[found.valid], found.logits[found.valid])
    some = torch.tensor([2, 0])
    other = target.module.rescore(x[some].requires_grad_(), found.select(some))
    torch.testing.assert_close(other[found.valid[some]], found.logits[some][found.valid[some]])
    assert other.requires_grad and not torch.allclose(target.module.rescore(x.flip(0), found), found.logits)


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_are_in_the_pixels_of_the_image_whatever_size_the_detector_works_at(kind: str) -> None:
    x = images()[0]
    found = robplug.target(network(kind, size=128)).proposals(x)
    widest = (found.boxes[..., 2:] - found.boxes[..., :2])[found.valid].amax()
    assert found.boxes[found.valid].amax() <= 64.001 and 0 < widest <= 64.001
    small, large = robplug.target(network(kind, size=64)), robplug.target(network(kind, size=128))
    widths = [(p.boxes[..., 2] - p.boxes[..., 0])[p.valid].median() for p in (small.proposals(x), large.proposals(x))]
    if kind != "ssd":  # whose anchors grow with the image
        assert widths[1] < 0.75 * widths[0]


def test_a_trained_detector_is_one_of_robplug_train() -> None:
    data = robplug.dataset("shapes-boxes", split="train", samples=2)
    module = robplug.target(network("retinanet")).module
    before = module.module.head.classification_head.cls_logits.bias.clone()
    robplug.train(module, data, epochs=1, lr=0.1, device="cpu")
    assert not torch.equal(before, module.module.head.classification_head.cls_logits.bias)


def test_an_art_estimator_is_divided_by_the_largest_value() -> None:
    from art.estimators.object_detection import PyTorchFasterRCNN

    model, (x, _) = network("faster-rcnn"), images()
    made = PyTorchFasterRCNN(model, input_shape=(3, 64, 64), clip_values=(0, 255), device_type="cpu")
    target = robplug.target(made)
    assert (target.task, target.bounds) == ("detection", (0.0, 255.0))
    own = made.predict((255 * x).numpy())
    found = target.detections(255 * x)
    for rows, one in zip(found, own, strict=True):
        count = len(one["boxes"])
        torch.testing.assert_close(rows[:count, :4], torch.from_numpy(one["boxes"]))
    other = PyTorchFasterRCNN(
        model, input_shape=(3, 64, 64), clip_values=(0, 255), preprocessing=(0.5, 2), device_type="cpu"
    )
    with pytest.raises(InputError, match="without preprocessing"):
        robplug.target(other)


def test_segmentation_networks_answer_with_their_logits() -> None:
    from torchvision.models.segmentation.fcn import FCN, FCNHead

    torch.manual_seed(0)
    backbone = nn.Module()
    backbone.forward = lambda x: {"out": nn.functional.avg_pool2d(x, 4).repeat(1, 8, 1, 1)}  # type: ignore[method-assign]
    model, x = FCN(backbone, FCNHead(24, CLASSES)).eval(), images()[0]
    target = robplug.target(model)
    assert target.task == "segmentation" and target.logits(x).shape == (3, CLASSES, 64, 64)
    assert torch.equal(target.logits(x), model(x)["out"])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="task='detection' of this model, got 'segmentation'"):
        robplug.target(network("ssd"), task="segmentation")
    model = network("faster-rcnn")
    model.roi_heads.mask_roi_pool = model.roi_heads.mask_head = model.roi_heads.mask_predictor = nn.Identity()
    with pytest.raises(InputError, match="a detector of boxes alone, got a FasterRCNN"):
        robplug.target(model)

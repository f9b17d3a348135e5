"""The small detectors: what they propose, detect and learn from, against plain loops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robplug
from robplug.plugins import registry
from robplug.targets import evaluation_mode
from robplug.tasks import overlap
from robplug.vision import detector
from robplug.vision.boxes import encode
from robplug.vision.detector import AnchorDetector, _match
from robplug.vision.protocol import Detector
from robplug.vision.shapes import shapes

NAMES = ("robplug/ssd-plain", "robplug/ssd-residual")


def small(name: str = NAMES[0]) -> AnchorDetector:
    torch.manual_seed(3)
    return registry().named_target(name, width=4).eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", NAMES)
def test_proposals_are_sorted_padded_and_differentiable(name: str) -> None:
    model, x = small(name), shapes(samples=3).x.requires_grad_()
    assert isinstance(model, Detector)
    found = model.proposals(x)
    count = found.valid.shape[1]
    assert found.boxes.shape == (3, count, 4) and found.logits.shape == (3, count, 4)
    assert int(found.valid.sum(1).max()) == count and not found.boxes.requires_grad
    assert (found.boxes >= 0).all() and (found.boxes <= 64).all()
    for boxes, logits, valid in zip(found.boxes, found.logits, found.valid, strict=True):
        background = logits.softmax(1)[valid, 0]
        assert torch.equal(background, background.sort().values)
        assert not overlap(boxes[None, valid], boxes[None, valid])[0].triu(1).gt(model.nms_threshold).any()
        assert torch.equal(valid, valid.sort(descending=True, stable=True).values)
    (gradient,) = torch.autograd.grad(found.logits[found.valid].sum(), x)
    assert gradient.abs().flatten(1).sum(1).gt(0).all()


def test_a_higher_threshold_keeps_more_proposals() -> None:
    model, x = small(), shapes(samples=2).x
    counts = []
    for model.nms_threshold in (0.3, 0.7, 1.0):
        counts.append(int(model.proposals(x).valid.sum()))
    assert counts[0] < counts[1] < counts[2] == 2 * 16 * 16 * 3  # every anchor


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_the_same_alone_and_in_company(name: str) -> None:
    model, x = small(name).double(), shapes(samples=3).x.double()  # in float32 near ties are sorted either way
    together, alone = model.proposals(x), model.proposals(x[1:2])
    valid = together.valid[1]
    torch.testing.assert_close(together.logits[1][valid], alone.logits[0][alone.valid[0]])
    torch.testing.assert_close(model.detections(x)[1:2], model.detections(x[1:2]))
    y = shapes(samples=3).labels("detection")
    torch.testing.assert_close(model.losses(x, y)[1:2], model.losses(x[1:2], y[1:2]))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_proposals_are_scored_again(name: str) -> None:
    model, x = small(name), shapes(samples=3).x
    found = model.proposals(x)
    torch.testing.assert_close(model.rescore(x, found), found.logits)
    some = torch.tensor([2, 0])
    torch.testing.assert_close(model.rescore(x[some], found.select(some)), found.logits[some])
    other = model.rescore(x.flip(0).requires_grad_(), found)
    assert other.requires_grad and not torch.allclose(other, found.logits)


def test_images_of_any_size() -> None:
    model = small()
    assert model(torch.rand(1, 3, 30, 45))[0].shape == (1, 8 * 12 * 3, 4)
    found = model.proposals(torch.rand(1, 3, 30, 45))
    assert found.boxes[..., 2].max() <= 45 and found.boxes[..., 3].max() <= 30


class Fixed(AnchorDetector):
    """Says what it is told; two anchors of 8 pixels at (2, 2) and (6, 2) for an image of 4 by 8."""

    def __init__(self, logits: Tensor, offsets: Tensor | None = None) -> None:
        super().__init__(nn.Identity(), 1, logits.shape[-1], [8])
        self.logits, self.offsets = logits, torch.zeros(*logits.shape[:2], 4) if offsets is None else offsets

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.logits, self.offsets


def test_anchors_stand_at_every_fourth_pixel() -> None:
    anchors = AnchorDetector(nn.Identity(), 1, 2, [8, 2])._anchors(torch.zeros(1, 3, 4, 8))
    expected = [[-2, -2, 6, 6], [1, 1, 3, 3], [2, -2, 10, 6], [5, 1, 7, 3]]
    assert anchors.tolist() == expected


def test_detections_are_those_of_a_plain_loop() -> None:
    torch.manual_seed(1)
    logits, offsets = 3 * torch.randn(2, 64, 3), 0.3 * torch.randn(2, 64, 4)
    model, x = Fixed(logits, offsets), torch.zeros(2, 3, 32, 32)
    boxes = model._boxes(offsets, x)
    found = model.detections(x)
    assert found.shape == (2, 100, 6)
    for image in range(2):
        expected = []
        scores = logits[image].softmax(1)
        for label in (1, 2):
            kept: list[int] = []
            for anchor in scores[:, label].argsort(descending=True).tolist():
                free = all(
                    overlap(boxes[image : image + 1, [anchor]], boxes[image : image + 1, [other]]) <= 0.5
                    for other in kept
                )
                if scores[anchor, label] >= 0.05 and free:
                    kept.append(anchor)
                    expected.append([*boxes[image, anchor].tolist(), float(scores[anchor, label]), label])
        expected.sort(key=lambda row: -row[4])
        real = found[image][found[image, :, 5] != -1]
        torch.testing.assert_close(real, torch.tensor(expected))
        assert (found[image, len(real) :] == -1).all()


def test_no_detection_at_all() -> None:
    found = Fixed(torch.tensor([[[9.0, 0, 0], [9, 0, 0]]])).detections(torch.zeros(1, 3, 4, 8))
    assert found.shape == (1, 100, 6) and (found == -1).all()


def loss_by_hand(logits: Tensor, offsets: Tensor, anchors: Tensor, rows: Tensor) -> Tensor:
    """The loss of one image, anchor by anchor."""
    real = rows[rows[:, 4] != -1]
    iou = overlap(anchors[None], real[None, :, :4])[0]
    forced = {int(iou[:, box].argmax()): box for box in range(len(real))}
    positive, negative, loss = 0, [], torch.zeros(())
    for anchor in range(len(anchors)):
        best = forced.get(anchor, int(iou[anchor].argmax()) if len(real) else 0)
        share = float(iou[anchor, best]) if len(real) else 0.0
        if anchor in forced or share >= 0.5:
            positive += 1
            aim = encode(real[best, :4], anchors[anchor])
            loss = loss + F.cross_entropy(logits[anchor], real[best, 4].long())
            loss = loss + F.smooth_l1_loss(offsets[anchor], aim, reduction="sum")
        elif share < 0.4:
            negative.append(float(F.cross_entropy(logits[anchor].detach(), torch.tensor(0))))
    hardest = sorted(negative, reverse=True)[: 3 * max(positive, 1)]
    return (loss + sum(hardest)) / max(positive, 1)


def test_the_loss_is_that_of_a_plain_loop() -> None:
    torch.manual_seed(2)
    data = shapes(samples=6)
    y = data.labels("detection").clone()
    y[5] = -1.0  # an image without objects
    model = small()
    model.sizes = (16, 24)
    model.score, model.move = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
    logits, offsets = model(data.x)
    anchors = model._anchors(data.x)
    expected = [loss_by_hand(*image[:2], anchors, image[2]) for image in zip(logits, offsets, y, strict=True)]
    torch.testing.assert_close(model.losses(data.x, y), torch.stack(expected))


def test_what_an_anchor_learns() -> None:
    """Half an overlap is enough, a little less is not asked about, and an object's best anchor learns it anyway."""
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 7], [50, 50, 53, 60], [80, 80, 90, 90]])
    y = torch.tensor([[[0.0, 0, 10, 20, 1], [50, 50, 60, 60, 2], [-1, -1, -1, -1, -1]]])  # IoU .5, .45, .35, and .3
    labels, boxes = _match(anchors, y)
    assert labels.tolist() == [[1, -1, 0, 2, 0]]
    assert boxes[0, [0, 3]].tolist() == y[0, :2, :4].tolist()


def test_two_objects_that_share_their_best_anchor() -> None:
    """One anchor cannot learn both; it learns one of them, and the loss stays finite."""
    y = torch.tensor([[[0.0, 0, 3, 3, 1], [1, 1, 4, 4, 2]]])
    logits = torch.tensor([[[0.0, 5, 0], [0, 0, 5]]])
    losses = Fixed(logits).losses(torch.zeros(1, 3, 4, 8), y)
    assert losses.isfinite().all()


def test_the_loss_has_a_gradient_in_images_and_parameters() -> None:
    model, data = small(), shapes(samples=2)
    x = data.x.requires_grad_()
    losses = model.losses(x, data.labels("detection"))
    gradients = torch.autograd.grad(losses.sum(), [x, *model.parameters()])
    assert all(bool(gradient.abs().sum() > 0) for gradient in gradients)


def test_nothing_about_the_model_changes() -> None:
    model, x = small(), shapes(samples=2).x
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with evaluation_mode(model):
        model.proposals(x), model.detections(x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.nms_threshold == 0.7


def test_a_name_says_its_task() -> None:
    tasks = {spec.name: spec.task for spec in robplug.list_targets()}
    for name in (*NAMES, "robplug/fcn-small", "robplug/unet-small", "robplug/lenet"):
        assert robplug.target(name).task == tasks[name]


def test_the_two_detectors_differ() -> None:
    assert [spec.task for spec in robplug.list_targets() if spec.name in NAMES] == ["detection"] * 2
    kinds = [
        {type(part).__name__ for part in getattr(detector, name)().modules()} for name in ("ssd_plain", "ssd_residual")
    ]
    assert "BasicBlock" not in kinds[0] and "BasicBlock" in kinds[1]

"""The attack on detectors: which proposals are targets, what of the detector is changed and put back, refresh."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import robplug
from robplug.errors import InputError, ThreatError
from robplug.norms import LINF
from robplug.referee.guard import Assignment, run_guarded
from robplug.rng import Rng
from robplug.targets import Target
from robplug.tasks import overlap
from robplug.types import Perturbed, ThreatModel
from robplug.vision.protocol import Proposals
from robplug.vision.shapes import shapes
from robplug_dag import dag
from robplug_dag.attack import DetectionAdversary, targets

THREAT = ThreatModel("linf", None)
CYCLE = (1, 2, 3, 0)
BOXES = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 5.0], [6.0, 6.0, 10.0, 10.0]], dtype=torch.float64)
"""The first two overlap by .8, which lies between the detector's own threshold and the attack's."""


class Means(nn.Module):
    """Three boxes; the logit of class k is 20 times channel k's mean in the box, that of the background 10.

    Images whose last pixel is 1 have but the first two boxes, and the third as padding.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("boxes", BOXES.clone())
        self.nms_threshold = 0.7
        self.seen: list[tuple[str, float, Tensor]] = []
        self.fails_at = 1000

    def rescore(self, x: Tensor, proposals: Proposals) -> Tensor:
        self._note("rescore", x)
        return self._logits(x, proposals.boxes)

    def proposals(self, x: Tensor) -> Proposals:
        self._note("proposals", x)
        boxes = self.boxes if self.nms_threshold > 0.8 else self.boxes[[0, 2]]
        valid = torch.ones(len(x), len(boxes), dtype=torch.bool)
        valid[x[:, 0, -1, -1] == 1, -1] = False
        boxes = boxes.expand(len(x), -1, -1)
        return Proposals(boxes, self._logits(x, boxes), valid)

    def detections(self, x: Tensor) -> Tensor:
        found = self.proposals(x)
        score, label = found.logits.softmax(2).max(2)
        return torch.cat([found.boxes, score[..., None], label.masked_fill(label == 0, -1)[..., None]], 2)

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        raise AssertionError("the attack works on logits and has no use for the training loss")

    def _note(self, what: str, x: Tensor) -> None:
        self.seen.append((what, self.nms_threshold, x.detach().clone()))
        if len(self.seen) > self.fails_at:
            raise RuntimeError("no memory")

    def _logits(self, x: Tensor, boxes: Tensor) -> Tensor:
        corners = [[[int(value) for value in box] for box in rows] for rows in boxes]
        cut = [
            [image[:, y1:y2, x1:x2].mean((1, 2)) for x1, y1, x2, y2 in rows]
            for image, rows in zip(x, corners, strict=True)
        ]
        means = torch.stack([torch.stack(rows) for rows in cut])
        return 20 * torch.cat([torch.full_like(means[..., :1], 0.5), means], 2)


def means() -> Target:
    return robplug.target(Means(), task="detection")


def scene() -> tuple[Tensor, Tensor]:
    """Returns four images of 12 by 12 and their objects.

    Objects of class 1 and 2; one of class 1 beside a padded proposal of class 2; one where there is no proposal; none.
    """
    x = torch.full((4, 3, 12, 12), 0.4, dtype=torch.float64)
    x[:3, 0, :5, :4] = x[:2, 1, 6:10, 6:10] = 0.6
    x[1, 1, 6:10, 6:10], x[1, :, -1, -1] = 0.6, 1.0
    y = torch.full((4, 2, 5), -1.0)
    y[:2, 0] = torch.tensor([0, 0, 4, 5, 1])
    y[:2, 1] = torch.tensor([6, 6, 10, 10, 2])
    y[2, 0] = torch.tensor([0, 8, 3, 12, 1])
    return x, y


def attacked(attack: DetectionAdversary, target: Target, x: Tensor, y: Tensor | None, ids: Any = None) -> Perturbed:
    return attack.run(target, x, y, THREAT, Rng(0, range(len(x)) if ids is None else ids))


def test_positive_proposals_against_a_plain_loop() -> None:
    def iou(a: list[float], b: list[float]) -> float:
        across, down = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
        areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
        return across * down / (sum(areas) - across * down)

    corner = 4 * torch.rand(30, 12, 2, dtype=torch.float64)
    boxes = torch.cat([corner, corner + torch.randint(2, 7, (30, 12, 2))], 2)
    start = 4 * torch.rand(30, 4, 2, dtype=torch.float64)
    labels = torch.randint(1, 4, (30, 4, 1)).double().masked_fill(torch.rand(30, 4, 1) < 0.25, -1)
    objects = torch.cat([start, start + torch.randint(2, 7, (30, 4, 2)), labels], 2)
    logits, valid = torch.randn(30, 12, 4, dtype=torch.float64), torch.rand(30, 12) < 0.8
    for positive in (0.1, 0.2):
        found = targets(boxes, logits, valid, objects, positive)
        expected, several = torch.full((30, 12), -1), 0
        for n in range(30):
            for r in range(12):
                probability = (logits[n, r].exp() / logits[n, r].exp().sum()).tolist()
                both = [
                    (iou(boxes[n, r].tolist(), row[:4]), int(row[4]))
                    for row in objects[n].tolist()
                    if row[4] != -1 and valid[n, r] and iou(boxes[n, r].tolist(), row[:4]) > positive
                    if probability[int(row[4])] > positive
                ]
                several += len({label for _, label in both}) > 1
                expected[n, r] = max(both, key=lambda one: one[0])[1] if both else -1
        assert torch.equal(found, expected)
        assert several > 20 and (expected == -1).any() and (expected > 0).any()
    assert torch.equal(targets(boxes, logits, valid, objects[:, :0], 0.1), torch.full((30, 12), -1))


def test_a_box_is_attacked_as_its_mean_says() -> None:
    """Where one box lies alone its pixels move by gamma a step, until .6 - m gamma < .4 + m gamma: 4 steps of .03."""
    x, y = scene()
    found = attacked(DetectionAdversary(gamma=0.03, steps=8, permutation=CYCLE), means(), x, y)
    change = found.x_adv - x
    assert change[0, 1, 6:10, 6:10].neg().allclose(change[0, 2, 6:10, 6:10]) and change[0, 2, 6:10, 6:10].min() > 0
    assert found.claim is not None and found.trace is not None and found.witness is None
    assert found.claim.tolist() == [True, True, False, False]
    assert found.trace[:, 0].tolist() == [3, 2, 0, 0] and (found.trace[:2, -1] == 0).all()
    outside = torch.ones(12, 12, dtype=torch.bool)
    outside[:5, :4] = outside[6:10, 6:10] = False
    assert not change[:, :, outside].any()
    after = means().module.detections(found.x_adv)[:2]
    assert (after[0, :, 5] != torch.tensor([1, 2])).all() and after[1, 0, 5] != 1
    alone = attacked(DetectionAdversary(gamma=0.03, steps=8, permutation=CYCLE), means(), x[:1], y[:1, 1:])
    expected = torch.zeros_like(x[:1])
    expected[0, 1, 6:10, 6:10], expected[0, 2, 6:10, 6:10] = -0.12, 0.12
    torch.testing.assert_close(alone.x_adv - x[:1], expected, rtol=0, atol=1e-12)
    assert alone.trace is not None and alone.trace.tolist() == [[1.0] * 4 + [0.0] * 4]


def test_padded_proposals_are_no_targets_and_images_without_positive_ones_stay_as_they_are() -> None:
    x, y = scene()
    target = means()
    found = attacked(DetectionAdversary(gamma=0.03), target, x, y)
    assert torch.equal(found.x_adv[1, :, 6:10, 6:10], x[1, :, 6:10, 6:10])  # an object, and a confident padded box
    assert torch.equal(found.x_adv[2:], x[2:]) and found.trace is not None and not found.trace[2:].any()
    assert found.claim is not None and not found.claim[2:].any()
    forwards = [len(images) for what, _, images in target.module.seen if what == "rescore"]
    assert max(forwards) == 2  # those two never enter


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    x, y = scene()
    attack, ids = DetectionAdversary(gamma=0.03, refresh=3), [9, 4, 7, 2]
    together = attacked(attack, means(), x, y, ids)
    for place, sample in enumerate(ids):
        alone = attacked(attack, means(), x[place : place + 1], y[place : place + 1], [sample])
        torch.testing.assert_close(alone.x_adv[0], together.x_adv[place], rtol=0, atol=1e-12)
        assert alone.trace is not None and together.trace is not None
        assert torch.equal(alone.trace[0], together.trace[place])
    other = attack.run(means(), x, y, THREAT, Rng(1, ids))
    assert not torch.equal(other.x_adv[:2], together.x_adv[:2])


def test_without_objects_the_own_detections_are_attacked() -> None:
    x, _ = scene()
    assert not torch.equal(attacked(DetectionAdversary(gamma=0.03), means(), x, None).x_adv[0], x[0])


def test_the_proposal_stage_is_denser_during_the_attack_and_as_before_afterwards() -> None:
    x, y = scene()
    target = means()
    attacked(DetectionAdversary(gamma=0.03, nms_threshold=0.85), target, x, y)
    counting, *during = target.module.seen  # one pass counts the classes
    assert counting[1] == 0.7 and {threshold for _, threshold, _ in during} == {0.85}
    assert target.module.nms_threshold == 0.7
    few = attacked(DetectionAdversary(gamma=0.03, nms_threshold=0.7), means(), x, y)
    assert few.trace is not None and few.trace[0, 0] == 2
    for calls in (1, 2, 4):
        target = means()
        target.module.fails_at = calls
        with pytest.raises(RuntimeError, match="no memory"):
            attacked(DetectionAdversary(gamma=0.03), target, x, y)
        assert target.module.nms_threshold == 0.7
    job = Assignment(DetectionAdversary(gamma=0.03), means(), LINF, THREAT, x, y, None, Rng(0, range(4)))
    outcome = run_guarded(job)
    assert not outcome.error and not outcome.notes and job.target.module.nms_threshold == 0.7


def test_refresh_makes_proposals_of_the_image_as_it_is() -> None:
    x, y = scene()
    target = means()
    found = attacked(DetectionAdversary(gamma=0.03, steps=8, refresh=3, permutation=CYCLE), target, x, y)
    made = [images for what, _, images in target.module.seen if what == "proposals"][1:]
    assert len(made) == 3 and torch.equal(made[0], x) and found.trace is not None and found.trace.shape == (4, 8)
    once = attacked(DetectionAdversary(gamma=0.03, steps=3, permutation=CYCLE), means(), x, y)
    assert torch.equal(made[1], once.x_adv) and not torch.equal(made[2], made[1])
    at_once = attacked(DetectionAdversary(gamma=0.03, steps=8, permutation=CYCLE), means(), x, y)
    torch.testing.assert_close(found.x_adv[:2], at_once.x_adv[:2])  # these proposals stay where they are


@pytest.mark.parametrize("refresh", [1, 2, 20])
def test_an_image_that_has_lost_its_targets_has_converged(refresh: int) -> None:
    x, y = scene()
    found = attacked(DetectionAdversary(gamma=0.2, steps=20, positive=0.6, refresh=refresh), means(), x, y)
    assert found.claim is not None and found.claim.tolist() == [True, True, False, False]


def trained() -> tuple[Target, Tensor, Tensor]:
    data = shapes(samples=3, contrast=0.3)
    model = robplug.target("robplug/ssd-plain").module.double().eval().requires_grad_(False)
    return robplug.target(model, task="detection"), data.x.double(), data.labels("detection")


def test_on_an_anchor_detector_it_is_algorithm_1_with_the_first_proposals() -> None:
    torch.manual_seed(0)
    target, x, y = trained()
    attack = DetectionAdversary(gamma=0.01, steps=4, permutation=CYCLE, nms_threshold=0.8)
    found = attacked(attack, target, x, y)
    assert target.module.nms_threshold == 0.7
    target.module.nms_threshold = 0.8
    with torch.no_grad():
        made = target.proposals(x)
    labels = targets(made.boxes, made.logits, made.valid, y, 0.1)
    goals = torch.tensor([*CYCLE, -1])[labels]
    for n in range(3):
        one = torch.tensor([n])
        x_adv, record = dag(
            lambda images: target.rescore(images, made.select(one)),  # noqa: B023
            x[one],
            labels[one],
            goals[one],
            gamma=0.01,
            steps=4,
        )
        torch.testing.assert_close(found.x_adv[one], x_adv, rtol=0, atol=1e-9)
        assert found.trace is not None and torch.equal(found.trace[n], record.active[0].float())
    assert found.trace is not None and (found.trace[:, 0] > 10).all()
    near = overlap(made.boxes, y[..., :4]).amax(2) > 0.1
    assert (labels >= 0).logical_and(~near).sum() == 0


X, Y = scene()


class Unknown(Means):
    def _logits(self, x: Tensor, boxes: Tensor) -> Tensor:
        return super()._logits(x, boxes) * torch.nan


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: DetectionAdversary(nms_threshold=1.0), InputError, "nms_threshold between 0 and 1, got 1.0"),
        (lambda: DetectionAdversary(positive=0.0), InputError, "positive between 0 and 1, got 0.0"),
        (lambda: DetectionAdversary(refresh=0), InputError, "refresh >= 1, or None, got 0"),
        (lambda: attacked(DetectionAdversary(), means(), X, Y[..., :4]), InputError, r"y of shape \(4, M, 5\)"),
        (
            lambda: attacked(DetectionAdversary(), means(), X, torch.where(Y == 2, 9, Y)),
            InputError,
            "labels of y from 1 to 3, got 1 to 9",
        ),
        (
            lambda: attacked(DetectionAdversary(), robplug.target(Unknown(), task="detection"), X, Y),
            InputError,
            "finite logits of the proposals, got nan in step 0",
        ),
        (
            lambda: DetectionAdversary().run(means(), X, Y, ThreatModel("linf", 0.1), Rng(0, range(4))),
            ThreatError,
            "got eps=0.1; DAG has no budget",
        ),
        (
            lambda: attacked(DetectionAdversary(), robplug.target(nn.Identity(), task="segmentation"), X, Y),
            ThreatError,
            "for detection, got one for segmentation",
        ),
    ],
)
def test_bad_input_is_refused_with_value_and_remedy(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()

"""What tasks say of answers, against plain loops over pixels and boxes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import robplug
from robplug.errors import InputError
from robplug.inputs import check_batch
from robplug.referee.precision import mean_average_precision
from robplug.tasks import TASKS, Classification, Detection, Segmentation, overlap, task_of, together
from robplug.types import ThreatModel

IGNORE, CLASSES = 255, 4


def pixels() -> tuple[Tensor, Tensor]:
    """Returns answers and labels of images (5, 6, 7); the fourth has no foreground, the last only ignored pixels."""
    y = torch.randint(0, CLASSES, (5, 6, 7))
    y[torch.rand(5, 6, 7) < 0.2] = IGNORE
    y[3], y[4] = 0, IGNORE
    answer = torch.where(torch.rand(5, 6, 7) < 0.6, y, torch.randint(0, CLASSES, (5, 6, 7)))
    answer[answer == IGNORE] = 1
    answer[1] = torch.where(torch.rand(6, 7) < 0.2, y[1], (y[1] + 1) % CLASSES)  # read wrong
    return answer.to(torch.int16), y


def test_scores_of_pixels_against_a_loop() -> None:
    task, (answer, y) = Segmentation(CLASSES), pixels()
    scores, codes = task.scores(answer, y), task.code(answer, y)
    for n in range(len(y)):
        pairs = [(int(a), int(b)) for a, b in zip(answer[n].flatten(), y[n].flatten(), strict=True) if b != IGNORE]
        front = [(a, b) for a, b in pairs if (a, b) != (0, 0)]
        for name, part in (("pixel_accuracy", pairs), ("foreground", front)):
            expected = sum(a == b for a, b in part) / len(part) if part else math.nan
            assert float(scores[name][n]) == pytest.approx(expected, nan_ok=True)
        for label in range(CLASSES):
            both = sum(a == b == label for a, b in pairs)
            union = sum(label in (a, b) for a, b in pairs)
            found = float(scores[f"intersection.{label}"][n]), float(scores[f"union.{label}"][n])
            assert found == pytest.approx((both, union) if union else (math.nan, math.nan), nan_ok=True)
        assert int(codes[n]) == (sum(a == b for a, b in front) >= 0.5 * len(front))
    assert codes[1] == 0 and codes[3:].tolist() == [0, 1]  # foreground that is not there is read; nothing is asked
    assert task.code(torch.zeros_like(answer), y)[3:].tolist() == [1, 1]
    assert task.attackable(codes, y).tolist() == [True, True, True, False, False]
    assert task.wanted(y).tolist() == [1] * 5


def test_logits_that_are_no_numbers_are_no_answer() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, 1 - x], 1).index_fill(3, torch.tensor(1), torch.nan)

    target = robplug.target(Broken(), task="segmentation")
    x, y = torch.rand(2, 1, 3, 3), torch.ones(2, 3, 3, dtype=torch.int64)
    answer = task_of(target).answer(target, x)
    assert (answer[:, :, 1] == -1).all() and (answer[:, :, [0, 2]] >= 0).all()
    assert task_of(target).code(answer, y).tolist() == [-1, -1]
    detections = torch.full((2, 1, 6), torch.nan)
    assert Detection(2).code(detections, torch.tensor([[[0.0, 0, 1, 1, 1]]] * 2)).tolist() == [-1, -1]


def iou(a: list[float], b: list[float]) -> float:
    across, down = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return across * down / (sum(areas) - across * down)


def boxes() -> tuple[Tensor, Tensor]:
    """Returns answers (20, 9, 6) and labels (20, 3, 5), some rows of which are padding; the last has no object."""
    start = 10 * torch.rand(20, 3, 2)
    y = torch.cat([start, start + 4 + 6 * torch.rand(20, 3, 2), torch.randint(1, CLASSES, (20, 3, 1))], 2)
    answer = y.repeat(1, 3, 1) + 2 * torch.rand(20, 9, 5) * torch.tensor([1, 1, 1, 1, 0])
    answer[..., 4] = torch.where(torch.rand(20, 9) < 0.8, answer[..., 4], torch.randint(1, CLASSES, (20, 9)))
    answer = torch.cat([answer[..., :4], torch.rand(20, 9, 1), answer[..., 4:]], 2)
    y[torch.rand(20, 3) < 0.3] = -1
    answer[torch.rand(20, 9) < 0.3] = -1
    y[19] = -1
    return answer, y


def test_scores_of_boxes_against_a_loop() -> None:
    task, (answer, y) = Detection(CLASSES), boxes()
    scores, codes = task.scores(answer, y), task.code(answer, y)
    for n in range(20):
        objects = [row for row in y[n].tolist() if row[4] != -1]
        sure = [row for row in answer[n].tolist() if row[5] != -1 and row[4] >= 0.5]
        found = sum(any(one[4] == row[5] and iou(one[:4], row[:4]) >= 0.5 for row in sure) for one in objects)
        idle = sum(not any(one[4] == row[5] and iou(one[:4], row[:4]) >= 0.5 for one in objects) for row in sure)
        assert [float(scores[name][n]) for name in ("boxes", "found", "spurious")] == [len(objects), found, idle]
        assert int(codes[n]) == (found >= 0.5 * (len(objects) + idle))
        assert bool(task.attackable(codes, y)[n]) == bool(objects)
        again = [row for row in task.labels(answer)[n].tolist() if row[4] != -1]
        assert again == [[*row[:4], row[5]] for row in sure]
    assert 0 < codes.sum() < 20


def test_overlap_against_a_loop() -> None:
    answer, y = boxes()
    found = overlap(y[..., :4].double(), answer[..., :4].double())
    for n, i, j in ((0, 0, 0), (3, 2, 7), (8, 1, 4), (12, 0, 8)):
        one, other = y[n, i, :4].tolist(), answer[n, j, :4].tolist()
        if -1 not in (one[0], other[0]):
            assert float(found[n, i, j]) == pytest.approx(iou(one, other))
    empty = torch.tensor([[[3.0, 3.0, 3.0, 3.0], [5.0, 5.0, 2.0, 2.0]]])
    assert not overlap(empty, empty).any()


def test_answers_of_batches_become_one() -> None:
    answer, _ = boxes()
    wide, narrow = answer[:3], answer[3:5, :4]
    joined = together([wide, narrow])
    assert torch.equal(joined[:3], wide) and torch.equal(joined[3:, :4], narrow) and (joined[3:, 4:] == -1).all()
    assert together([torch.arange(2), torch.arange(3)]).tolist() == [0, 1, 0, 1, 2]


def test_mean_average_precision_of_a_case_with_known_value() -> None:
    """Precision is 1 up to recall 1/2 and 2/3 beyond, read at 101 recalls; the last box overlaps by .62."""
    first, second = [0, 0, 10, 10], [20, 20, 30, 30]
    objects = [torch.tensor([[*first, 1], [*second, 1]]).double().numpy(), torch.zeros(0, 5).double().numpy()]
    exact = [[*first, 0.9, 1], [*second, 0.7, 1]]
    other = [[40, 0, 50, 10, 0.8, 1]]
    empty = torch.zeros(0, 6).double().numpy()

    def precision(*parts: Any) -> dict[str, float]:
        return mean_average_precision(
            objects, [torch.tensor(part).double().numpy() if part else empty for part in parts]
        )

    known = (51 + 50 * 2 / 3) / 101
    assert precision(exact, other) == pytest.approx({"mAP 50": known, "mAP": known})
    loose = [[*first, 0.9, 1], [20, 20, 26.2, 30, 0.7, 1]]
    half = 51 / 101  # at overlaps of .65 and more the second box is not found
    assert precision(loose, other) == pytest.approx({"mAP 50": known, "mAP": (3 * known + 7 * half) / 10})
    assert precision([[*first, 0.9, 2]], []) == {"mAP 50": 0.0, "mAP": 0.0}
    assert precision([], []) == {"mAP 50": 0.0, "mAP": 0.0}


def test_mean_average_precision_is_that_of_pycocotools() -> None:
    """Called in another way: by files' rows in one array, and class by class."""
    import numpy as np
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    answer, y = boxes()
    rows = [[row[row[:, -1] != -1].double().numpy() for row in part] for part in (y, answer)]
    coco = COCO()
    coco.dataset = {"info": {}, "images": [{"id": 100 + n} for n in range(20)], "annotations": []}
    coco.dataset["categories"] = [{"id": label} for label in range(1, CLASSES)]
    for n, objects in enumerate(rows[0]):
        for x1, y1, x2, y2, label in objects.tolist():
            box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
            number = len(coco.dataset["annotations"]) + 1
            coco.dataset["annotations"].append(
                {"id": number, "image_id": 100 + n, "category_id": label, "iscrowd": 0, **box}
            )
    coco.createIndex()
    table = [
        [100 + n, r[0], r[1], r[2] - r[0], r[3] - r[1], r[4], r[5]] for n, part in enumerate(rows[1]) for r in part
    ]
    each = []
    for label in range(1, CLASSES):
        evaluation = COCOeval(coco, coco.loadRes(np.array(table)), "bbox")
        evaluation.params.catIds = [label]
        evaluation.evaluate()
        evaluation.accumulate()
        each.append(evaluation.eval["precision"][:, :, 0, 0, 2])
    mean = np.stack(each)
    found = mean_average_precision(*rows)
    assert found == pytest.approx({"mAP 50": mean[:, 0].mean(), "mAP": mean.mean()}, abs=1e-12)
    assert 0.2 < found["mAP 50"] < 0.95


X = torch.rand(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("task", "y", "words"),
    [
        (Segmentation(4), torch.zeros(2, 4, 5).long(), r"y of shape \(2, 4, 4\), \(N, H, W\).*got \(2, 4, 5\)"),
        (Segmentation(4), torch.zeros(2, 4, 4), "an integer dtype, got .* torch.float32"),
        (Segmentation(4), torch.full((2, 4, 4), 4), "below 4, or 255 where it is to be ignored, got 4 to 4"),
        (Segmentation(4), torch.full((2, 4, 4), -1), "not negative and below 4"),
        (Segmentation(None), [0], "y to be a tensor, got list"),
        (Detection(4), torch.zeros(2, 5), r"y of shape \(2, M, 5\), rows x1, y1, x2, y2, label, got \(2, 5\)"),
        (Detection(4), torch.tensor([[[0.0, 0, 1, 1, 0]]] * 2), "labels of y from 1 to 3, got 0 to 0"),
        (Detection(4), torch.tensor([[[0.0, 0, 1, 1, 4]]] * 2), "labels of y from 1 to 3, got 4 to 4"),
        (
            Detection(None),
            torch.tensor([[[0.0, 0, 1, 1, 1]], [[3.0, 1, 2, 2, 1]]]),
            r"x1 < x2 and y1 < y2, got \[3.0, 1.0, 2.0, 2.0, 1.0\]",
        ),
        (Detection(4), torch.tensor([[[0.0, torch.nan, 1, 1, 1]]] * 2), "x1 < x2"),
        (Classification(3), torch.tensor([0, 3]), "below 3, got 0 to 3"),
    ],
)
def test_labels_that_do_not_fit_are_refused(task: Any, y: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        task.check(y, X)
    fine = {"segmentation": torch.full((2, 4, 4), 255), "detection": torch.full((2, 3, 5), -1.0)}
    for name, labels in fine.items():
        TASKS[name](4).check(labels, X)


def test_logits_of_another_size_than_the_images_are_refused() -> None:
    target = robplug.target(nn.AvgPool2d(2), task="segmentation")
    with pytest.raises(InputError, match=r"logits of the images' size \(4, 4\), got \(2, 2\); upsample"):
        task_of(target).answer(target, X)


def test_a_detector_has_the_methods_and_the_threshold_of_the_protocol() -> None:
    with pytest.raises(InputError, match="without proposals, rescore, detections, losses, nms_threshold"):
        robplug.target(nn.Identity(), task="detection")


def test_labels_are_the_own_answers_where_there_are_none() -> None:
    target = robplug.target(nn.Identity(), task="segmentation")
    assert torch.equal(check_batch(target, X, None, ThreatModel("linf"), None), X.argmax(1))

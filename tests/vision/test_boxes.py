"""Arithmetic of boxes against plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robplug.tasks import overlap
from robplug.vision.boxes import decode, encode, survivors


def random_boxes(*shape: int) -> Tensor:
    low = torch.rand(*shape, 2) * 20
    return torch.cat([low, low + 1 + torch.rand(*shape, 2) * 10], -1)


def iou(one: list[float], other: list[float]) -> float:
    width = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return width * height / (sum(areas) - width * height)


def greedy(boxes: list[list[float]], alive: list[bool], threshold: float) -> list[bool]:
    kept: list[int] = []
    for row, box in enumerate(boxes):
        if alive[row] and all(iou(box, boxes[other]) <= threshold for other in kept):
            kept.append(row)
    return [row in kept for row in range(len(boxes))]


def test_overlaps_are_those_of_each_pair() -> None:
    one, other = random_boxes(3, 5).double(), random_boxes(3, 7).double()
    expected = [[[iou(a, b) for b in y] for a in x] for x, y in zip(one.tolist(), other.tolist(), strict=True)]
    torch.testing.assert_close(overlap(one, other), torch.tensor(expected, dtype=torch.float64))


def test_boxes_without_area_overlap_nothing() -> None:
    empty = torch.tensor([[[-1.0, -1, -1, -1], [5, 5, 5, 9]]])
    assert not overlap(empty, torch.cat([empty, torch.tensor([[[0.0, 0, 10, 10]]])], 1)).any()


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 0.9])
def test_survivors_are_those_of_the_greedy_loop(threshold: float) -> None:
    boxes, alive = random_boxes(4, 60), torch.rand(4, 60) < 0.8
    expected = [greedy(*image, threshold) for image in zip(boxes.tolist(), alive.tolist(), strict=True)]
    assert survivors(boxes, alive, threshold).tolist() == expected


def test_a_chain_of_boxes_is_followed_to_its_end() -> None:
    """Each hides the next, so that every second one survives: the case that needs most repetitions."""
    start = torch.arange(40.0)
    boxes = torch.stack([start, 0 * start, start + 3, 0 * start + 1], -1)[None]
    kept = survivors(boxes, torch.ones(1, 40, dtype=torch.bool), 0.4)
    assert kept[0].tolist() == [row % 2 == 0 for row in range(40)]


def test_offsets_and_boxes_are_inverse() -> None:
    anchors, boxes = random_boxes(6).double(), random_boxes(6).double()
    torch.testing.assert_close(decode(encode(boxes, anchors), anchors), boxes)
    torch.testing.assert_close(decode(torch.zeros(6, 4).double(), anchors), anchors)
    centre = torch.tensor([[2.0, 4.0, 6.0, 12.0]])  # 4 wide, 8 high, at (4, 8)
    moved = decode(torch.tensor([[0.5, -0.25, 0.0, 0.0]]), centre)
    torch.testing.assert_close(moved, torch.tensor([[4.0, 2.0, 8.0, 10.0]]))

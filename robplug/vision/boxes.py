"""Arithmetic of boxes, rows x1, y1, x2, y2, in plain PyTorch and by the batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robplug.tasks import overlap
from robplug.vision.protocol import Proposals

LARGEST_GROWTH = math.log(1000 / 16)
"""Largest logarithm by which a network's offsets may change a width, as in other implementations."""


def survivors(boxes: Tensor, alive: Tensor, threshold: float) -> Tensor:
    """Greedy non-maximum suppression of boxes that are already sorted, the best first.

    Going down the list, a box is kept unless it overlaps a kept one before it by more than the threshold. The rule has
    one solution, and repeating it for all boxes at once reaches it from the top.

    Args:
        boxes: (N, R, 4).
        alive: (N, R) bool, which boxes take part.
        threshold: IoU.

    Returns:
        (N, R) bool, the boxes that are kept.
    """
    hides = (overlap(boxes, boxes) > threshold).triu(1) & alive[:, :, None]
    kept = alive
    while True:
        again = alive & ~(hides & kept[:, :, None]).any(1)
        if torch.equal(again, kept):
            return kept
        kept = again


def distinct(boxes: Tensor, logits: Tensor, threshold: float, anchors: Tensor | None = None) -> Proposals:
    """Returns what non-maximum suppression leaves of classified boxes, the one with least background first.

    Args:
        boxes: (N, A, 4).
        logits: (N, A, C), class 0 the background.
        threshold: IoU above which the box with more background is dropped.
        anchors: (N, A) int64, numbers of the boxes among all anchors; without, they are all of them.
    """
    order = logits.detach().softmax(2)[..., 0].argsort(dim=1, stable=True)
    valid = survivors(rows(boxes, order), torch.ones_like(order, dtype=torch.bool), threshold)
    first = (~valid).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(valid.sum(1).amax())]
    order = order.gather(1, first)
    numbers = order if anchors is None else anchors.gather(1, order)
    return Proposals(rows(boxes, order), rows(logits, order), valid.gather(1, first), numbers)


def rows(values: Tensor, index: Tensor) -> Tensor:
    """Returns rows of (..., R, K) by their numbers (..., S), (..., S, K)."""
    return values.gather(-2, index[..., None].expand(*index.shape, values.shape[-1]))


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Returns the offsets (..., 4) that `decode` turns into these boxes: centres by the anchor's size, log sizes."""
    size, centre = _size_and_centre(boxes)
    anchor_size, anchor_centre = _size_and_centre(anchors)
    return torch.cat([(centre - anchor_centre) / anchor_size, (size / anchor_size).log()], -1)


def decode(offsets: Tensor, anchors: Tensor) -> Tensor:
    """Returns boxes (..., 4) from offsets to anchors.

    Source: Girshick et al. 2014, appendix C.
    """
    anchor_size, anchor_centre = _size_and_centre(anchors)
    centre = anchor_centre + offsets[..., :2] * anchor_size
    half = 0.5 * anchor_size * offsets[..., 2:].clamp_max(LARGEST_GROWTH).exp()
    return torch.cat([centre - half, centre + half], -1)


def _size_and_centre(boxes: Tensor) -> tuple[Tensor, Tensor]:
    return boxes[..., 2:] - boxes[..., :2], 0.5 * (boxes[..., :2] + boxes[..., 2:])

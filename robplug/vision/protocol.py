"""What a detector is to attacks, training and referee."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class Proposals:
    """Boxes that a detector classifies, before it decides which of them are detections.

    Attributes:
        boxes: (N, R, 4) rows x1, y1, x2, y2 in pixels; carries no gradient.
        logits: (N, R, C), class 0 the background; differentiable in the images.
        valid: (N, R) bool, False for the rows that fill up images with fewer than R proposals.
        anchors: (N, R) int64, by which the detector finds them again; None where the boxes themselves say it.
    """

    boxes: Tensor
    logits: Tensor
    valid: Tensor
    anchors: Tensor | None = None

    def select(self, images: Tensor) -> Proposals:
        """Returns the proposals of some of the images, (n,) int64."""
        anchors = None if self.anchors is None else self.anchors[images]
        return Proposals(self.boxes[images], self.logits[images], self.valid[images], anchors)


@runtime_checkable
class Detector(Protocol):
    """An nn.Module that finds boxes in images, (N, 3, H, W) inside the bounds of its target.

    Attributes:
        nms_threshold: proposals that overlap a better one by a larger IoU are dropped; may be set.
    """

    nms_threshold: float

    def proposals(self, x: Tensor) -> Proposals:
        """Returns the proposals and their class logits."""
        ...

    def rescore(self, x: Tensor, proposals: Proposals) -> Tensor:
        """Returns the logits, (N, R, C), that the same proposals have in other images; differentiable in these."""
        ...

    def detections(self, x: Tensor) -> Tensor:
        """Returns (N, D, 6) rows x1, y1, x2, y2, score, label, the best first, filled up with rows of label -1."""
        ...

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns (N,) the loss of each image, differentiable; y (N, M, 5) as in `robplug.data.Dataset`."""
        ...

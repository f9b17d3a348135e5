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
    """

    boxes: Tensor
    logits: Tensor
    valid: Tensor


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

    def detections(self, x: Tensor) -> Tensor:
        """Returns (N, D, 6) rows x1, y1, x2, y2, score, label, the best first, filled up with rows of label -1."""
        ...

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns (N,) the loss of each image, differentiable; y (N, M, 5) as in `robplug.data.Dataset`."""
        ...

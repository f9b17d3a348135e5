"""What tasks differ in: the form of labels and answers, and when an answer is right.

Labels and answers are tensors whose first axis is the sample:

    classification   y (N,) int64 classes; answers (N,) classes
    segmentation     y (N, H, W) int64 classes, 0 the background and 255 to be ignored; answers (N, H, W) classes
    detection        y (N, M, 5) boxes x1, y1, x2, y2, label, in pixels; answers (N, D, 6) with a score before label;
                     both are padded with rows of label -1, and label 0, the background, does not occur

A row of results has one number for an answer, its code: the class, or where an image has many, 1 for right and 0 for
wrong; -1 where the model gave no number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from robplug.data import IGNORE
from robplug.errors import InputError
from robplug.targets import Target

PADDING = -1
"""The label of rows that are no box."""
RIGHT = 0.5
"""Share from which on an image counts as read right: of what is foreground, or is read as such, in pixels or boxes."""
OVERLAP = 0.5
"""Intersection over union from which on a detection finds a box."""
CONFIDENT = 0.5
"""Score from which on a detection counts."""


class Task(Protocol):
    """How answers to one task are judged."""

    def answer(self, target: Target, x: Tensor) -> Tensor:
        """Returns the model's answers, first axis N."""
        ...

    def labels(self, answer: Tensor) -> Tensor:
        """Returns the labels for which these answers would be right."""
        ...

    def wanted(self, y: Tensor) -> Tensor:
        """Returns (N,) int64, the codes of right answers."""
        ...

    def code(self, answer: Tensor, y: Tensor) -> Tensor:
        """Returns (N,) int64, the codes of answers."""
        ...

    def attackable(self, code: Tensor, y: Tensor) -> Tensor:
        """Returns (N,) bool, the samples worth attacking; ``code`` is that of the clean answers."""
        ...

    def scores(self, answer: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Returns what is stored of each answer beside its code, (N,) float64 by name; nan is not stored."""
        ...

    def check(self, y: Tensor, x: Tensor, name: str = "y") -> None:
        """Refuses labels that are none of this task or do not fit the samples.

        Raises:
            InputError: the message says what was expected.
        """
        ...


@dataclass(frozen=True)
class Classification:
    """One class a sample.

    Attributes:
        classes: number of classes, or None if it is not known.
    """

    classes: int | None = None

    def answer(self, target: Target, x: Tensor) -> Tensor:
        return target.predict(x) if len(x) else torch.zeros(0, dtype=torch.int64, device=x.device)

    def labels(self, answer: Tensor) -> Tensor:
        return answer

    def wanted(self, y: Tensor) -> Tensor:
        return y

    def code(self, answer: Tensor, y: Tensor) -> Tensor:
        return answer

    def attackable(self, code: Tensor, y: Tensor) -> Tensor:
        return code == y

    def scores(self, answer: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {}

    def check(self, y: Tensor, x: Tensor, name: str = "y") -> None:
        _check_classes(y, tuple(x.shape[:1]), "(N,)", self.classes, name)


@dataclass(frozen=True)
class Segmentation:
    """One class a pixel; an image is read right if half of the pixels that are foreground, or are read as such, are.

    Attributes:
        classes: number of classes with the background, or None if it is not known.
    """

    classes: int | None = None

    def answer(self, target: Target, x: Tensor) -> Tensor:
        answer = target.predict(x)
        if answer.shape[1:] != x.shape[-2:]:
            remedy = "upsample the logits in a module around the network"
            raise InputError(f"logits of the images' size {tuple(x.shape[-2:])}", tuple(answer.shape[1:]), remedy)
        return answer.to(torch.int16)  # a data set's answers are kept

    def labels(self, answer: Tensor) -> Tensor:
        return answer.long()

    def wanted(self, y: Tensor) -> Tensor:
        return torch.ones(len(y), dtype=torch.int64, device=y.device)

    def code(self, answer: Tensor, y: Tensor) -> Tensor:
        right, either = self._foreground(answer, y)
        read = right.flatten(1).sum(1) >= RIGHT * either.flatten(1).sum(1)
        return read.long().masked_fill_((answer < 0).flatten(1).any(1), -1)

    def attackable(self, code: Tensor, y: Tensor) -> Tensor:
        return _foreground(y).flatten(1).any(1)

    def scores(self, answer: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Returns pixel_accuracy, foreground, and of each class that occurs intersection.K and union.K, in pixels."""
        labelled = y != IGNORE
        found = {
            "pixel_accuracy": _share((answer == y) & labelled, labelled),
            "foreground": _share(*self._foreground(answer, y)),
        }
        for label in range(self.classes or 0):
            here, there = (y == label), (answer == label) & labelled
            union = (here | there).flatten(1).sum(1).double()
            both = (here & there).flatten(1).sum(1).double()
            found[f"intersection.{label}"] = both.masked_fill(union == 0, torch.nan)
            found[f"union.{label}"] = union.masked_fill(union == 0, torch.nan)
        return found

    def check(self, y: Tensor, x: Tensor, name: str = "y") -> None:
        _check_classes(y, (len(x), *x.shape[-2:]), "(N, H, W)", self.classes, name, ignore=True)

    def _foreground(self, answer: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Returns which pixels are foreground and read as their class, and which are, or are read as, foreground."""
        foreground = _foreground(y)
        return (answer == y) & foreground, (foreground | (answer != 0)) & (y != IGNORE)


@dataclass(frozen=True)
class Detection:
    """Boxes with classes; an image is read right if half of what it has, or is read as having, are boxes found.

    A box is found by a detection of its label with a score of at least .5 and an overlap (intersection over union) of
    at least .5.

    Attributes:
        classes: number of classes with the background, or None if it is not known.
    """

    classes: int | None = None

    def answer(self, target: Target, x: Tensor) -> Tensor:
        return target.detections(x)

    def labels(self, answer: Tensor) -> Tensor:
        sure = answer[..., [0, 1, 2, 3, 5]]
        boxes = _confident(answer) & (answer[..., :2] < answer[..., 2:4]).all(-1)  # what has no area is no label
        return sure.masked_fill(~boxes[..., None], PADDING)

    def wanted(self, y: Tensor) -> Tensor:
        return torch.ones(len(y), dtype=torch.int64, device=y.device)

    def code(self, answer: Tensor, y: Tensor) -> Tensor:
        found, boxes, spurious = self._found(answer, y)
        right = (found >= RIGHT * (boxes + spurious)).long()
        return right.masked_fill_(answer.isnan().flatten(1).any(1), -1)

    def attackable(self, code: Tensor, y: Tensor) -> Tensor:
        return (y[..., 4] != PADDING).any(1)

    def scores(self, answer: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Returns the numbers of boxes, of those that are found, and of confident detections that find none."""
        found, boxes, spurious = self._found(answer, y)
        return {"boxes": boxes.double(), "found": found.double(), "spurious": spurious.double()}

    def check(self, y: Tensor, x: Tensor, name: str = "y") -> None:
        if not (isinstance(y, Tensor) and y.dim() == 3 and len(y) == len(x) and y.shape[2] == 5):
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise InputError(f"{name} of shape ({len(x)}, M, 5), rows x1, y1, x2, y2, label", got)
        rows = y[y[..., 4] != PADDING]
        fits = (rows[:, :2] < rows[:, 2:4]).all(1)  # false also for nan
        if not bool(fits.all()):
            raise InputError(f"boxes of {name} with x1 < x2 and y1 < y2", rows[~fits][0].tolist())
        if len(rows) and (rows[:, 4].min() < 1 or (self.classes is not None and rows[:, 4].max() >= self.classes)):
            limit = "" if self.classes is None else f" to {self.classes - 1}"
            span = f"{int(rows[:, 4].min())} to {int(rows[:, 4].max())}"
            raise InputError(f"labels of {name} from 1{limit}", span, "0 is the background, -1 pads")

    def _found(self, answer: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (N,) the numbers of boxes that are found, of boxes, and of confident detections that find none."""
        boxes, confident = y[..., 4] != PADDING, _confident(answer)
        same = (answer[:, None, :, 5] == y[:, :, None, 4]) & boxes[:, :, None] & confident[:, None, :]
        hit = same & (overlap(y[..., :4], answer[..., :4]) >= OVERLAP)
        return hit.any(2).sum(1), boxes.sum(1), (confident & ~hit.any(1)).sum(1)


def task_of(target: Target) -> Task:
    """Returns how the answers of a target are judged."""
    return TASKS[target.task](target.classes)


TASKS: dict[str, Callable[[int | None], Task]] = {
    "classification": Classification,
    "segmentation": Segmentation,
    "detection": Detection,
}


def together(parts: Sequence[Tensor]) -> Tensor:
    """Returns the answers of several batches as one; rows of boxes are padded to the same number."""
    most = max(part.shape[1] for part in parts) if parts[0].dim() > 1 else 0
    padded = [
        F.pad(part, (0, 0, 0, most - part.shape[1]), value=PADDING)
        if part.dim() == 3 and part.shape[1] < most
        else part
        for part in parts
    ]
    return torch.cat(padded)


def overlap(one: Tensor, other: Tensor) -> Tensor:
    """Returns the intersection over union of boxes (N, A, 4) and (N, B, 4), (N, A, B); 0 where both are empty."""
    low = torch.maximum(one[:, :, None, :2], other[:, None, :, :2])
    high = torch.minimum(one[:, :, None, 2:], other[:, None, :, 2:])
    both = (high - low).clamp_min(0).prod(-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).clamp_min(0).prod(-1) for boxes in (one, other)]
    return both / (areas[0][:, :, None] + areas[1][:, None, :] - both).clamp_min(torch.finfo(both.dtype).tiny)


def _foreground(y: Tensor) -> Tensor:
    return (y != 0) & (y != IGNORE)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """Returns (N,) how much of the whole the part is, nan where there is no whole."""
    return part.flatten(1).sum(1).double() / whole.flatten(1).sum(1)


def _confident(answer: Tensor) -> Tensor:
    return (answer[..., 5] != PADDING) & (answer[..., 4] >= CONFIDENT)


def _check_classes(
    y: Tensor, shape: tuple[int, ...], form: str, classes: int | None, name: str, ignore: bool = False
) -> None:
    if not isinstance(y, Tensor):
        raise InputError(f"{name} to be a tensor", type(y).__name__, "torch.from_numpy makes one of an array")
    if y.shape != shape or y.is_floating_point() or y.dtype == torch.bool:
        expected = f"{name} of shape {shape}, {form}, and an integer dtype"
        raise InputError(expected, f"{tuple(y.shape)} {y.dtype}", "pass class numbers")
    asked = y[y != IGNORE] if ignore else y
    if asked.numel() and (asked.min() < 0 or (classes is not None and asked.max() >= classes)):
        limit = "" if classes is None else f" and below {classes}"
        also = f", or {IGNORE} where it is to be ignored" if ignore else ""
        raise InputError(f"{name} not negative{limit}{also}", f"{int(asked.min())} to {int(asked.max())}")

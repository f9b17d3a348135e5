"""Data sets: what a data set is, and the digits that are shipped. Those a user brings are in `robplug.data_files`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from robplug.errors import InputError
from robplug.types import Task

ASSETS = Path(__file__).parent / "assets"


IGNORE = 255
"""The pixel label that stands for no class: such pixels are neither trained on nor counted."""


@dataclass(frozen=True)
class Dataset:
    """Samples and labels in memory.

    Labels of ``"classification"`` are (N,) int64 classes. Those of ``"segmentation"`` are (N, H, W) int64 classes, 0
    the background and `IGNORE` none. Those of ``"detection"`` are (N, M, 5) float32 rows x1, y1, x2, y2, in pixels with
    right and bottom edges exclusive, and the class, 1 or more, for 0 is the background; where an image has fewer than M
    boxes, rows whose class is -1 come after them.

    Attributes:
        name: for tables.
        x: (N, ...) float32 samples inside ``bounds``.
        y: (N, ...) labels of ``task``.
        bounds: smallest and largest value of a sample.
        class_names: one per class, the background included where the task has one.
        task: what ``y`` are labels of.
        others: (N, ...) labels of the same samples for further tasks, by task.
    """

    name: str
    x: Tensor
    y: Tensor
    bounds: tuple[float, float] = (0.0, 1.0)
    class_names: tuple[str, ...] = ()
    task: Task = "classification"
    others: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.x)

    def head(self, count: int) -> Dataset:
        """Returns the first ``count`` samples."""
        return self._each(lambda tensor: tensor[:count])

    def take(self, rows: Tensor) -> Dataset:
        """Returns the samples of some rows, (K,) int64, in that order."""
        return self._each(lambda tensor: tensor[rows])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Dataset:
        others = {task: change(labels) for task, labels in self.others.items()}
        return replace(self, x=change(self.x), y=change(self.y), others=others)

    def labels(self, task: str) -> Tensor:
        """Returns the labels of a task.

        Raises:
            InputError: the data set has none for it.
        """
        known = {self.task: self.y, **self.others}
        if task not in known:
            raise InputError(f"{self.name} with labels for {task}", f"labels for {', '.join(known)}")
        return known[task]

    @property
    def digest(self) -> str:
        """SHA-256 of samples and labels."""
        content = hashlib.sha256(str((tuple(self.x.shape), self.bounds)).encode())
        for tensor in (self.x, self.y):
            content.update(tensor.contiguous().numpy().tobytes())
        if self.task != "classification" or self.others:
            for task, labels in sorted({self.task: self.y, **self.others}.items()):
                content.update(str((self.task, task, tuple(labels.shape))).encode())
                content.update(labels.contiguous().numpy().tobytes())
        return content.hexdigest()


def digits(split: str = "test") -> Dataset:
    """The 8x8 UCI digits, shipped with robplug: 1,797 grey images of ten classes.

    Every third image of each class, in the order of the file, belongs to ``"test"`` (596 images), the others to
    ``"train"`` (1,201); ``"all"`` is both. The same writers are in both parts.

    Args:
        split: ``"train"``, ``"test"`` or ``"all"``.

    Returns:
        x (N, 1, 8, 8) in [0, 1], sixteenths.

    Source: Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository
        (its testing part); licence in ``assets/digits-LICENSE.txt``.

    Example:
        >>> digits("train").x.shape
        torch.Size([1201, 1, 8, 8])
    """
    check_split(split, ("train", "test", "all"), "digits")
    with np.load(ASSETS / "digits.npz", allow_pickle=False) as arrays:
        images, labels = arrays["x"], arrays["y"].astype(np.int64)
    in_test = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        in_test[np.flatnonzero(labels == label)[2::3]] = True
    keep = {"train": ~in_test, "test": in_test, "all": np.ones_like(in_test)}[split]
    x = torch.from_numpy(images[keep]).to(torch.float32).div_(16.0).unsqueeze_(1)
    return Dataset("digits", x, torch.from_numpy(labels[keep]), class_names=tuple("0123456789"))


def check_split(split: str, known: Sequence[str], name: str) -> None:
    """Refuses a split that a data set does not have."""
    if split not in known:
        raise InputError(f"a split of {name}: {' or '.join(known)}", repr(split))

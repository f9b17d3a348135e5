"""A synthetic data set for two tasks: shapes on grey, told apart by a faint colour."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from robplug.data import Dataset, check_split
from robplug.errors import InputError

HUES = {
    "red": (1, -1, -1),
    "green": (-1, 1, -1),
    "blue": (-1, -1, 1),
    "yellow": (1, 1, -1),
    "cyan": (-1, 1, 1),
    "magenta": (1, -1, 1),
}
"""Each class of object: the sign of its difference to grey in red, green and blue."""

MOST = 4
RADII = (5, 12)
SPLITS = ("train", "test")

Image = NDArray[np.float32]
Labels = NDArray[np.int64]
Boxes = NDArray[np.float32]


def shapes(
    split: str = "test",
    samples: int = 500,
    size: int = 64,
    seed: int = 0,
    classes: int = 4,
    contrast: float = 0.04,
    noise: float = 0.01,
) -> Dataset:
    """Discs, squares, triangles and diamonds on grey, with pixel labels and with boxes under ``"detection"``.

    An image has one to four shapes whose boxes do not overlap, 11 to 25 pixels wide. The class of a shape is its colour
    alone: grey 0.5 with ``contrast`` added to or taken from each of red, green and blue. Image k of a split depends on
    seed, split and k only, so that fewer samples are the first of more.

    Args:
        split: ``"train"`` or ``"test"``, which have no image in common.
        samples: number of images.
        size: height and width in pixels.
        seed: of all draws.
        classes: number of classes, with the background; up to seven.
        contrast: what a shape differs from grey by.
        noise: standard deviation of the normal noise in each value.

    Returns:
        x (N, 3, size, size) in [0, 1]; y (N, size, size), 0 the background, no pixel ignored.

    Raises:
        InputError: a parameter that does not fit.

    Example:
        >>> data = shapes(samples=2)
        >>> data.y.shape, data.labels("detection").shape
        (torch.Size([2, 64, 64]), torch.Size([2, 4, 5]))
    """
    check_split(split, SPLITS, "shapes")
    if samples < 1:
        raise InputError("samples >= 1", samples)
    if size < 2 * RADII[1] + 1:
        raise InputError(f"size >= {2 * RADII[1] + 1}, so that every shape fits", size)
    if not 2 <= classes <= len(HUES) + 1:
        raise InputError(f"2 to {len(HUES) + 1} classes, the background among them", classes)
    if not (contrast > 0 and noise >= 0 and contrast + 8 * noise <= 0.5):
        raise InputError("contrast > 0, noise >= 0 and contrast + 8 noise <= 0.5", (contrast, noise))
    streams = [np.random.default_rng([seed, SPLITS.index(split), index]) for index in range(samples)]
    scenes = [_scene(random, size, classes, contrast, noise) for random in streams]
    images, pixels, boxes = (torch.from_numpy(np.stack(part)) for part in zip(*scenes, strict=True))
    names = ("background", *list(HUES)[: classes - 1])
    return Dataset("shapes", images, pixels, class_names=names, task="segmentation", others={"detection": boxes})


def shapes_boxes(split: str = "test", **params: float) -> Dataset:
    """The images of `shapes` as a data set for detection: boxes as y, the pixel labels under ``"segmentation"``.

    Args:
        split: as of `shapes`.
        **params: as of `shapes`.
    """
    data = shapes(split, **params)  # type: ignore[arg-type]
    return replace(
        data, name="shapes-boxes", y=data.labels("detection"), task="detection", others={"segmentation": data.y}
    )


def _scene(
    random: np.random.Generator, size: int, classes: int, contrast: float, noise: float
) -> tuple[Image, Labels, Boxes]:
    """Draws one image: values (3, size, size), pixel labels (size, size), boxes (MOST, 5)."""
    labels = np.zeros((size, size), dtype=np.int64)
    taken = np.zeros((size, size), dtype=bool)
    rows = []
    for _ in range(int(random.integers(1, MOST + 1))):
        radius = int(random.integers(*RADII, endpoint=True))
        x, y = (int(value) for value in random.integers(radius, size - radius, 2))
        label, kind = int(random.integers(1, classes)), int(random.integers(4))
        left, top, right, bottom = x - radius, y - radius, x + radius + 1, y + radius + 1
        box = np.s_[top:bottom, left:right]
        if taken[box].any():
            continue  # the boxes would overlap: this image has one shape less
        taken[box] = True
        labels[box][_mask(kind, radius)] = label
        rows.append((left, top, right, bottom, label))
    boxes = np.full((MOST, 5), -1, dtype=np.float32)
    boxes[: len(rows)] = rows
    colours = np.array([(0, 0, 0), *HUES.values()], dtype=np.float32)[labels].transpose(2, 0, 1)
    image = 0.5 + contrast * colours + noise * random.standard_normal((3, size, size))
    return image.astype(np.float32), labels, boxes


def _mask(kind: int, radius: int) -> NDArray[np.bool_]:
    """Returns which pixels of a box of 2 radius + 1 pixels a shape covers; it touches all four sides."""
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    masks = (
        x**2 + y**2 <= (radius + 0.25) ** 2,  # disc
        np.ones_like(x, dtype=bool),  # square
        2 * np.abs(x) <= y + radius,  # triangle
        np.abs(x) + np.abs(y) <= radius,  # diamond
    )
    mask: NDArray[np.bool_] = masks[kind]
    return mask

"""Images of a user, with their labels, as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robplug.data import IGNORE
from robplug.errors import InputError
from robplug.tasks import PADDING

GREY = 128
Bytes = NDArray[np.uint8]
Boxes = Sequence[tuple[float, ...]]


@dataclass(frozen=True)
class Sample:
    """One image.

    Attributes:
        image: (H, W, 3).
        path: the file of its labels, for messages.
        pixels: (H, W) labels, or None.
        boxes: rows x1, y1, x2, y2, label.
    """

    image: Bytes
    path: Path
    pixels: Bytes | None = None
    boxes: Boxes = ()


def batch_pixels(samples: Sequence[Sample], size: int | None) -> tuple[Tensor, Tensor]:
    """Returns x (N, 3, H, W) in [0, 1] and y (N, H, W).

    Args:
        samples: with pixels.
        size: height and width: the longer side becomes ``size``, images bilinearly and labels by the nearest pixel;
            grey, and the label `IGNORE`, fill up what is below or to the right. None takes images of one size.

    Raises:
        InputError: there is no image, labels are not of their image's size, or sizes differ.
    """
    for sample in samples:
        if sample.pixels is None or sample.pixels.shape != sample.image.shape[:2]:
            got = None if sample.pixels is None else sample.pixels.shape
            raise InputError(f"labels of their image's size {sample.image.shape[:2]} in {sample.path}", got)
    y = [_fitted(sample.pixels, size, IGNORE) for sample in samples if sample.pixels is not None]
    return _images(samples, size), torch.from_numpy(np.stack(y).astype(np.int64))


def batch_boxes(samples: Sequence[Sample], size: int | None) -> tuple[Tensor, Tensor]:
    """Returns x (N, 3, H, W) in [0, 1] and y (N, M, 5), boxes scaled with their images.

    Args:
        samples: with boxes.
        size: as of `batch_pixels`.

    Raises:
        InputError: there is no image, a box is empty or reaches out of its image by more than a pixel, or sizes differ.
    """
    parts = []
    for sample in samples:
        height, width = sample.image.shape[:2]
        rows = torch.tensor(sample.boxes, dtype=torch.float32).view(-1, 5)
        limits = torch.tensor([width, height, width, height])
        whole = (rows[:, :4] >= -1) & (rows[:, :4] <= limits + 1)
        if not (whole.all() and (rows[:, :2] < rows[:, 2:4]).all()):
            raise InputError(
                f"boxes with an area inside an image of {width} x {height} pixels in {sample.path}",
                rows[:, :4].tolist(),
            )
        new_height, new_width = _size(sample.image, size)
        ratio = torch.tensor([new_width / width, new_height / height] * 2 + [1.0])
        parts.append(rows * ratio)
    y = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=PADDING) if parts else torch.empty(0)
    return _images(samples, size), y


def _images(samples: Sequence[Sample], size: int | None) -> Tensor:
    if not samples:
        raise InputError("at least one image", "none")
    images = [_fitted(sample.image, size, GREY) for sample in samples]
    for sample, image in zip(samples, images, strict=True):
        if image.shape != images[0].shape:
            expected = f"images of one size, {images[0].shape[:2]}"
            raise InputError(expected, f"{image.shape[:2]} of {sample.path}", "pass size= to bring them to one")
    return torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).astype(np.float32)).div_(255.0)


def _fitted(values: Bytes, size: int | None, fill: int) -> Bytes:
    """Returns an image (H, W, 3), or labels (H, W), brought to a size."""
    if size is None:
        return values
    from PIL import Image

    height, width = _size(values, size)
    how = Image.Resampling.BILINEAR if values.ndim == 3 else Image.Resampling.NEAREST
    whole = np.full((size, size, *values.shape[2:]), fill, dtype=np.uint8)
    whole[:height, :width] = np.asarray(Image.fromarray(values).resize((width, height), how))
    return whole


def _size(values: Bytes, size: int | None) -> tuple[int, int]:
    """Returns height and width after scaling."""
    height, width = values.shape[:2]
    if size is None:
        return height, width
    longer = max(height, width)
    return max(1, round(height * size / longer)), max(1, round(width * size / longer))

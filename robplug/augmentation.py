"""Random crops and flips of training images, in the form of a defence: it stacks with all others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from robplug.defenses import Defense
from robplug.errors import InputError
from robplug.step import Step


@dataclass(frozen=True)
class CropFlip(Defense):
    """Pads each image, cuts a window of its own size out at a random place, and mirrors every second one on average.

    Source: He et al. 2016, section 4.2.

    Attributes:
        padding: pixels added on each side; they are 0, or the bound of the data nearest to it.
        flip: whether images are mirrored, left to right.
    """

    padding: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise InputError("padding >= 0", self.padding)

    def augment(self, step: Step) -> Tensor:
        """Returns images, (N, C, H, W), as ``step.x``.

        Raises:
            InputError: the samples are no images.
        """
        if step.x.dim() != 4:
            raise InputError("images of shape (N, C, H, W) to crop", tuple(step.x.shape), "leave robplug/crop-flip out")
        x = self._crop(step) if self.padding else step.x
        if self.flip:
            mirrored = step.rng.integers(2, device=x.device).bool()
            x = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(3), x)
        return x

    def _crop(self, step: Step) -> Tensor:
        count, _, height, width = step.x.shape
        low, high = step.bounds
        padded = F.pad(step.x, (self.padding,) * 4, value=min(max(0.0, low), high))
        corner = step.rng.integers(2 * self.padding + 1, (2,), device=step.x.device)
        rows = corner[:, :1] + torch.arange(height, device=step.x.device)
        columns = corner[:, 1:] + torch.arange(width, device=step.x.device)
        sample = torch.arange(count, device=step.x.device).view(-1, 1, 1)
        # channels last for the indexing, which puts the indexed axes first
        cropped = padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]]
        return cropped.permute(0, 3, 1, 2).contiguous()

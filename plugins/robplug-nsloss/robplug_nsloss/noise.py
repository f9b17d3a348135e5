"""Noise on the sphere around samples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from robplug.errors import InputError
from robplug_nsloss.kernels.ops import sphere_noise

MOST_DRAWS = 127  # sums of signs are int8


@dataclass(frozen=True)
class Noise:
    """Copies of samples with noise on the sphere ||delta||_2 = radius, uniform on it.

    Attributes:
        radius: in units of the data.
        draws: number of copies, 1 to 127.
        clip: smallest and largest value of a copy, or None to let it leave the box.
        generator: of PyTorch, on the device of the samples; None means the global one.

    Raises:
        InputError: radius or draws do not fit.
    """

    radius: float = 1.0
    draws: int = 5
    clip: tuple[float, float] | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.radius) and self.radius > 0):
            raise InputError("a finite radius > 0", self.radius, "the paper has 1.0 for MNIST and 3.0 for CIFAR-10")
        if not 1 <= self.draws <= MOST_DRAWS:
            raise InputError(f"draws from 1 to {MOST_DRAWS}", self.draws, "the paper has 5 and 10")

    def copies(self, x: Tensor) -> Iterator[Tensor]:
        """Yields the noisy copies of x, (B, ...), one at a time."""
        x = x.detach()
        for _ in range(self.draws):
            normal = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=self.generator)
            noisy = sphere_noise(x, normal, self.radius)
            yield noisy if self.clip is None else noisy.clamp(*self.clip)


def check_samples(x: Tensor) -> None:
    """Refuses a batch without samples or of whole numbers."""
    if not len(x) or not x.is_floating_point():
        raise InputError("a batch of at least one sample of a floating dtype", f"{tuple(x.shape)} {x.dtype}")

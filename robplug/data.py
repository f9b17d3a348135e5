"""Data sets."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Dataset:
    """Samples and labels in memory.

    Attributes:
        name: for tables.
        x: (N, ...) float32 samples inside ``bounds``.
        y: (N,) int64 labels.
        bounds: smallest and largest value of a sample.
        class_names: one per class.
    """

    name: str
    x: Tensor
    y: Tensor
    bounds: tuple[float, float] = (0.0, 1.0)
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.x)

    def head(self, count: int) -> Dataset:
        """Returns the first ``count`` samples."""
        return replace(self, x=self.x[:count], y=self.y[:count])

    @property
    def digest(self) -> str:
        """SHA-256 of samples and labels."""
        content = hashlib.sha256(str((tuple(self.x.shape), self.bounds)).encode())
        for tensor in (self.x, self.y):
            content.update(tensor.contiguous().numpy().tobytes())
        return content.hexdigest()

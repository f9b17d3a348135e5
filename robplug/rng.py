"""Random numbers that a sample's neighbours cannot change.

Each sample has a counter-based stream of its own: numpy's Philox, keyed by (seed, sample id) with the restart in
the highest counter word. Draws are made on the CPU and moved, so they are the same on every device.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch

from robplug.errors import InputError

_U64 = 1 << 64
EVERYONE = _U64 - 1
"""The id of the stream that all samples share; no sample has it."""


class Rng:
    """A stream per sample.

    Args:
        seed: seed shared by all samples.
        ids: one non-negative number per sample; the stream depends on it and on nothing else of the batch.
        restart: number of the restart; each has fresh streams.

    Example:
        >>> import torch
        >>> like = torch.empty(())
        >>> alone = Rng(0, [7]).uniform((2,), like=like)
        >>> company = Rng(0, [3, 7]).uniform((2,), like=like)
        >>> bool((alone[0] == company[1]).all())
        True
    """

    def __init__(self, seed: int, ids: Sequence[int] | range, restart: int = 0) -> None:
        if seed < 0 or any(i < 0 for i in ids):
            raise InputError("seed >= 0 and sample ids >= 0", (seed, list(ids)))
        self.seed = seed
        self.ids = tuple(int(i) for i in ids)
        self.restart = restart
        self._calls = 0
        # shared with all selections, so that a stream goes on where any of them has left it
        self._pool: list[np.random.Generator | None] = [None] * (len(self.ids) + 1)  # the last is everyone's
        self._places: Sequence[int] = range(len(self.ids))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def _streams(self) -> list[np.random.Generator]:
        """The streams of the rows, made when they are first drawn from: most attacks draw nothing."""
        for row, place in enumerate(self._places):
            if self._pool[place] is None:
                key = np.array([self.seed % _U64, self.ids[row]], dtype=np.uint64)  # a list would pass through float64
                self._pool[place] = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, self.restart]))
        return [stream for place in self._places if (stream := self._pool[place]) is not None]

    def select(self, keep: torch.Tensor) -> Rng:
        """Returns the streams of some samples, which go on where they are.

        Args:
            keep: (N,) bool.
        """
        rows = keep.nonzero().flatten().tolist()
        part = copy.copy(self)  # the pool stays shared
        part.ids = tuple(self.ids[row] for row in rows)
        part._places = [self._places[row] for row in rows]
        return part

    def shared(self) -> Rng:
        """Returns the one stream of all samples with this seed and restart, whatever batch they are in.

        For draws that a whole batch has in common: each batch draws the same ones, so that a sample's do not depend on
        its neighbours. They are (1, *shape) and go on where they are.
        """
        part = copy.copy(self)  # the pool stays shared
        part.ids, part._places = (EVERYONE,), [-1]
        return part

    def at_restart(self, restart: int) -> Rng:
        """Returns fresh streams for another restart."""
        return Rng(self.seed, self.ids, restart)

    def next_call(self, count: int) -> Rng:
        """Returns fresh streams for a batch of ``count`` samples; each call's differ from all earlier ones.

        For exports, which are called again and again on batches whose samples have no known ids.
        """
        self._calls += 1
        seed = int(np.random.SeedSequence([self.seed, self._calls]).generate_state(1, np.uint64)[0])
        return Rng(seed, range(count))

    def batch_seed(self) -> int:
        """Returns a seed for code that knows only global generators; it depends on the seed and all the ids."""
        entropy = [self.seed, self.restart, *self.ids]
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])

    def uniform(self, shape: Sequence[int], low: float = 0.0, high: float = 1.0, *, like: torch.Tensor) -> torch.Tensor:
        """Draws (N, *shape) from [low, high), with dtype and device of ``like``."""
        unit = self._draw(lambda stream: stream.random(tuple(shape), dtype=np.float64), shape, like)
        return unit.mul_(high - low).add_(low)

    def normal(self, shape: Sequence[int], *, like: torch.Tensor) -> torch.Tensor:
        """Draws (N, *shape) from the standard normal distribution."""
        return self._draw(lambda stream: stream.standard_normal(tuple(shape)), shape, like)

    def exponential(self, shape: Sequence[int], *, like: torch.Tensor) -> torch.Tensor:
        """Draws (N, *shape) from the exponential distribution of mean 1."""
        return self._draw(lambda stream: stream.standard_exponential(tuple(shape)), shape, like)

    def integers(self, high: int, shape: Sequence[int] = (), *, device: torch.device | str = "cpu") -> torch.Tensor:
        """Draws (N, *shape) int64 from {0, ..., high - 1}."""
        draws = [np.asarray(stream.integers(high, size=tuple(shape))) for stream in self._streams]
        array = np.stack(draws) if draws else np.zeros((0, *shape), dtype=np.int64)
        return torch.from_numpy(array).to(device)

    def rearranged(self, images: torch.Tensor) -> torch.Tensor:
        """Returns images (N, ..., H, W) with rows and columns in random order: one order of each an image."""
        like = torch.empty((), dtype=torch.float64)
        rows, columns = (self.uniform((side,), like=like).argsort(1).to(images.device) for side in images.shape[-2:])
        flat = images.flatten(1, -3)
        flat = flat.take_along_dim(rows[:, None, :, None], 2).take_along_dim(columns[:, None, None, :], 3)
        return flat.view(images.shape)

    def _draw(self, draw, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
        array = np.stack([draw(s) for s in self._streams]) if self.ids else np.zeros((0, *shape))
        return torch.from_numpy(array).to(device=like.device, dtype=like.dtype)

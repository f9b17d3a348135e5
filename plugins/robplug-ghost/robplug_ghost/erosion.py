"""The erosions as modules, and the ghost that they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from robplug.errors import InputError
from robplug_ghost.kernels.ops import erode_add, erode_dropout, erode_scale
from robplug_ghost.kernels.reference import series_seed


@dataclass
class Ghost:
    """The ghost that a network is at the moment, one of a series; all erosions of a network share one such object.

    It is no buffer, and replaced by no other object: that a ghost is drawn is no change of the network.

    Attributes:
        series: seed of the series, and of its first ghost.
        seed: of the present ghost.
        erosions: number of erosions so far.
    """

    series: int
    seed: int = 0
    erosions: int = 0
    _next: int = 0

    def restart(self, series: int) -> None:
        """Goes back to the first ghost of a series."""
        if not 0 <= series < 2**63:
            raise InputError("a seed from 0 to 2**63 - 1", series, "take it modulo 2**63")
        self.series = series
        self.choose(0)
        self._next = 0

    def choose(self, number: int) -> None:
        """Becomes the ghost with this number in the series."""
        self.seed = series_seed(self.series, number) if number else self.series

    def advance(self) -> None:
        """Becomes the ghost whose turn it is."""
        self.choose(self._next)
        self._next += 1

    def draw(self) -> int:
        """Returns the seed and counts an erosion."""
        self.erosions += 1
        return self.seed


class ErodeAdd(nn.Module):
    """What stands for a residual addition: w * shortcut + residual, and a ReLU where one follows.

    Args:
        ghost: which ghost.
        layer: number of the erosion among those of its kind.
        skip: width of the erosion.
        relu: whether a ReLU follows.
    """

    def __init__(self, ghost: Ghost, layer: int, skip: float, relu: bool) -> None:
        super().__init__()
        self.ghost, self.layer, self.skip, self.relu = ghost, layer, skip, relu

    def forward(self, shortcut: Tensor, residual: Tensor) -> Tensor:
        """Returns the sum; (N, C, ...) as both are."""
        seed = self.ghost.draw()
        return erode_add(shortcut, residual, seed, self.layer, self.skip, "relu" if self.relu else None)

    def extra_repr(self) -> str:
        return f"layer={self.layer}, skip={self.skip:g}, relu={self.relu}"


class ErodeOutput(nn.Module):
    """A module whose output is eroded.

    Args:
        module: the module.
        ghost: which ghost.
        layer: number of the erosion among those of its kind.
        skip: width of skip erosion of a module that is a shortcut, or None.
        keep: probability of dropout erosion, or None; one of the two is given.
    """

    def __init__(self, module: nn.Module, ghost: Ghost, layer: int, *, skip: float | None, keep: float | None) -> None:
        super().__init__()
        self.module = module
        self.ghost, self.layer, self.skip, self.keep = ghost, layer, skip, keep

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Returns what the module returns, eroded; (N, C, ...)."""
        out = self.module(*args, **kwargs)
        if not isinstance(out, Tensor):
            kind = f"a {type(out).__name__} from {type(self.module).__name__}"
            raise InputError("a block that returns one tensor", kind, "name other modules")
        if self.skip is not None:
            return erode_scale(out, self.ghost.draw(), self.layer, self.skip)
        assert self.keep is not None  # one of the two
        return erode_dropout(out, self.ghost.draw(), self.layer, self.keep)

    def extra_repr(self) -> str:
        amount = f"keep={self.keep:g}" if self.skip is None else f"skip={self.skip:g}"
        return f"layer={self.layer}, {amount}"

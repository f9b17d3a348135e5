"""Input diversity: images are randomly resized and padded before each gradient."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from robplug.errors import InputError
from robplug.rng import Rng
from robplug.targets import Target
from robplug_di2.kernels.ops import Mode, resize_pad

Padding = Literal["grey", "zero"]


@dataclass(frozen=True)
class InputDiversity:
    """With probability p, an image is resized to a random size and padded to a larger one at a random place.

    Of S lines, rnd are made, drawn from [S, M) with M = S * 330/299, and put at an offset from [0, M - rnd) on M lines:
    the result is larger than the image, so that only a model that takes any size can be asked about it. Rows and
    columns share one draw of the size and have an offset each. The attacks of this plugin derive from this class; an
    object of it is a transform for others, such as PGD::

        robplug.attack("robplug/pgd", transform=InputDiversity())

    Source: Xie et al. 2019, Improving Transferability of Adversarial Examples with Input Diversity, eq. 5 and section
        4.1; the authors' code, where the text is silent or says otherwise: both intervals are open at the end, and what
        the text calls zeros are zeros of [-1, 1], a grey.
    Differs: the authors draw anew for each batch. Here all samples of one seed share one sequence of draws, whatever
        batch they come in: within a batch that is the same, but a sample's result does not depend on its neighbours,
        and batches of one run are diversified alike. Images that are not square keep their proportions.

    Attributes:
        p: probability that a step sees transformed images.
        ratio: M / S. Below 1, as in torchattacks, sizes come from [ratio * S, S) and M is S: what other code calls a
            resize rate of 0.9 is 0.9 here, and the model sees images of their own size.
        mode: of resizing: ``"nearest"`` as the authors have it, or ``"bilinear"``.
        padding: ``"grey"``, the middle of the bounds, or ``"zero"``.
        resize_back: resize the padded image to the size that it had, for models that take no other.
        per_sample: each sample has draws of its own. Images of two sizes fit into no batch, so that this wants
            ``resize_back``, a ratio below 1, or p = 1.
    """

    p: float = 0.5
    ratio: float = 330 / 299
    mode: Mode = "nearest"
    padding: Padding = "grey"
    resize_back: bool = False
    per_sample: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise InputError("a probability p from 0 to 1", self.p)
        if not 0 < self.ratio < float("inf") or self.ratio == 1:
            raise InputError("a ratio > 0 other than 1", self.ratio, "the paper's is 330/299; p=0 leaves images alone")
        for name, known in (("mode", get_args(Mode)), ("padding", get_args(Padding))):
            if getattr(self, name) not in known:
                raise InputError(f"{name} to be {' or '.join(known)}", repr(getattr(self, name)))
        if self.per_sample and not self.resize_back and self.ratio > 1 and 0 < self.p < 1:
            remedy = "set resize_back=True, a ratio below 1, p=1 or per_sample=False"
            raise InputError("samples of one size in a batch", "per_sample=True, which would mix two", remedy)

    def __call__(self, x: Tensor, rng: Rng, bounds: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        """Transforms a batch with the next draws of ``rng``.

        Args:
            x: (N, C, H, W) images.
            rng: a stream per sample, and the one that they share.
            bounds: of the data, for their middle.

        Returns:
            (N, C, M, M'), or (N, C, H, W) with ``resize_back`` or a ratio below 1; x itself where nothing was drawn.
            The dtype stays. Differentiable any number of times.

        Raises:
            InputError: x is no batch of images, or the padding is outside of the bounds.
        """
        if self.p == 0:
            return x
        if x.dim() != 4:
            raise InputError("images (N, C, H, W) to resize", tuple(x.shape), "p=0 does without")
        low, high = (torch.tensor(sides) for sides in zip(*map(self.sides, x.shape[2:]), strict=True))
        if bool((low == high).all()):
            remedy = "choose a ratio that is further from 1"
            warnings.warn(
                f"images of {_by(x.shape[2:])} are too small for a ratio of {self.ratio:.4g}; {remedy}", stacklevel=2
            )
            return x
        fill = self._fill(bounds)
        # on the CPU, where the streams are: the GPU need not wait
        streams = rng if self.per_sample else rng.shared()
        draws = streams.uniform((4,), like=torch.empty((), dtype=torch.float64))
        moved = draws[:, 0] < self.p
        if not bool(moved.any()):
            return x
        size = low + (draws[:, 1:2] * (high - low)).long()
        offset = (draws[:, 2:] * (high - size)).long()
        size, offset = (pair.expand(len(x), 2).to(x.device) for pair in (size, offset))
        out = resize_pad(x, size, offset, (int(high[0]), int(high[1])), self.mode, fill)
        if self.resize_back:
            out = F.interpolate(
                out, x.shape[2:], mode=self.mode, align_corners=False if self.mode == "bilinear" else None
            )
        return out if bool(moved.all()) else torch.where(moved.to(x.device).view(-1, 1, 1, 1), out, x)

    def sides(self, side: int) -> tuple[int, int]:
        """Returns the sizes (low, high) of a side: it is resized to [low, high) lines, and padded to high."""
        scaled = int(side * self.ratio + 1e-9)  # 299 * (330 / 299) is just below 330
        return (side, scaled) if self.ratio > 1 else (max(scaled, 1), side)

    def _fill(self, bounds: tuple[float, float]) -> float:
        low, high = bounds
        fill = (low + high) / 2 if self.padding == "grey" else 0.0
        if not low <= fill <= high:
            raise InputError(f"a padding inside the bounds {bounds}", fill, "set padding='grey'")
        return fill

    @contextmanager
    def explaining(self, target: Target, x: Tensor) -> Iterator[None]:
        """Turns the error of a model that takes images of one size only into one that says so.

        Raises:
            InputError: the model raised a RuntimeError, and does so for images of the canvas's size.
        """
        try:
            yield
        except RuntimeError as error:
            canvas = [self.sides(side)[1] for side in x.shape[2:]]
            if self.p == 0 or self.resize_back or canvas == list(x.shape[2:]) or _takes(target, x, canvas):
                raise
            remedy = "set resize_back=True or a ratio below 1"
            raise InputError(
                f"a model that takes images of {_by(canvas)}", f"one for {_by(x.shape[2:])}", remedy
            ) from error


def _by(sides: Sequence[int]) -> str:
    return "x".join(map(str, sides))


def _takes(target: Target, x: Tensor, canvas: list[int]) -> bool:
    """Returns whether the model can be asked about images of another size."""
    try:
        with torch.no_grad():
            target.logits(x.new_full((1, x.shape[1], *canvas), sum(target.bounds) / 2))
    except RuntimeError:
        return False
    return True

"""Comparing noisy passes with a clean one, one at a time, and the gradient of what they differ by.

The loss is a sum over draws, and its derivative by an activation is a sign. A draw's gradient can thus be taken as soon
as its pass is made, the clean side held fixed; and the clean side needs no more than the sums of the signs, in int8.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robplug.errors import InputError
from robplug_nsloss.activations import passes_of
from robplug_nsloss.kernels.calls import is_native, parts_and_signs
from robplug_nsloss.kernels.ops import means_and_signs
from robplug_nsloss.kernels.reference import joined
from robplug_nsloss.kernels.surrogate import sign_surrogate
from robplug_nsloss.noise import Noise
from robplug_nsloss.passes import Watched, same_statistics


@dataclass
class Compared:
    """The comparison of all draws with the clean pass.

    Attributes:
        means: (L,) per layer mean |difference|, summed over the draws.
        signs: per layer the sum over the draws of the differences' signs, int8.
        gradients: of the sum of ``means`` by the parameters, the clean side held fixed.
    """

    means: Tensor
    signs: list[Tensor]
    gradients: list[Tensor | None]


def loss_against(clean: Watched, model: nn.Module, x: Tensor, noise: Noise, layers: Sequence[str] | None) -> Tensor:
    """Returns `ns_loss` beside a clean pass that has been made; the model must be in the modes of that pass."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = compare(clean, model, x, noise, layers, parameters)
    factor = 1 / (noise.draws * noise.radius)
    loss: Tensor = factor * _Known.apply(found.means.sum(), found.gradients, *parameters)  # type: ignore[no-untyped-call]
    sides = zip(clean.activations, found.signs, strict=True)
    tracked = [(activation, signs) for activation, signs in sides if activation.requires_grad]
    return loss - factor * sign_surrogate(*zip(*tracked, strict=True)).sum() if tracked else loss


def compare(
    clean: Watched,
    model: nn.Module,
    x: Tensor,
    noise: Noise,
    layers: Sequence[str] | None,
    parameters: list[nn.Parameter],
) -> Compared:
    """Compares the passes of noisy copies with a clean pass; arguments are those of `loss_against`.

    Raises:
        InputError: the passes have other layers, or an activation is not finite.
    """
    fixed = [activation.detach() for activation in clean.activations]
    sums = [torch.empty_like(activation, dtype=torch.int8) for activation in fixed]
    # a kernel finds a layer in the cache; operators would drive the network's own layers out of it
    native = any(map(is_native, fixed, sums))
    gradients: list[Tensor | None] = [None] * len(parameters)
    means: list[Tensor] = []
    with passes_of(model, layers) as one_pass:
        for draw, copy in enumerate(noise.copies(x)):
            at_once = _AtOnce(clean.names, fixed, sums, draw) if native else None
            with same_statistics(clean.statistics), one_pass(own=True, seen=at_once and at_once.seen) as noisy:
                model(copy)
            _check_same(clean.names, noisy.names)
            if at_once is not None:
                mean, signs = joined(at_once.found, fixed)
            else:  # on CUDA all layers in one launch
                mean, signs = means_and_signs(fixed, noisy.tensors, sums, draw)
            means.append(mean)
            if any(activation.requires_grad for activation in noisy.tensors):
                change = sign_surrogate(noisy.tensors, signs).sum()
                del noisy, signs, at_once  # before the next pass
                gradients = _added(gradients, _gradients(change, parameters, _scale(fixed)))
    total = torch.stack(means).sum(0)
    _check_finite(clean.names, total)
    return Compared(total, sums, gradients)


class _AtOnce:
    """Compares layers as they are computed, while they are in the cache.

    Attributes:
        found: of each layer what `parts_and_signs` returns.
    """

    def __init__(self, names: list[str], clean: list[Tensor], sums: list[Tensor], draw: int) -> None:
        self._names, self._clean, self._sums, self._draw = names, clean, sums, draw
        self.found: list[tuple[Tensor, Tensor]] = []

    @torch.compiler.disable
    def seen(self, names: list[str], out: Tensor) -> None:
        """Compares a layer; other layers than those of the clean pass are refused after the pass."""
        number = len(names) - 1
        if names == self._names[: number + 1]:
            self.found.append(parts_and_signs(self._clean[number], out.detach(), self._sums[number], self._draw))


def _check_same(clean: list[str], noisy: list[str]) -> None:
    if clean != noisy:
        expected = f"the layers of the clean pass ({', '.join(clean)}) in that of noisy samples"
        remedy = "the forward depends on the values of its samples: name layers that are always used"
        raise InputError(expected, ", ".join(noisy), remedy)


def _gradients(loss: Tensor, parameters: list[nn.Parameter], scale: float) -> list[Tensor | None]:
    found = torch.autograd.grad(loss * scale, parameters, allow_unused=True)
    return [gradient if gradient is None or scale == 1 else gradient / scale for gradient in found]


def _scale(clean: list[Tensor]) -> float:
    """Returns a power of two that keeps 1 / numel, small as it is, in the range of half precision."""
    if all(activation.dtype != torch.float16 for activation in clean):
        return 1.0
    counts = [activation.numel() for activation in clean]
    return float(2.0 ** round(math.log2(min(counts) * max(counts)) / 2))


def _added(sums: Sequence[Tensor | None], more: Sequence[Tensor | None]) -> list[Tensor | None]:
    pairs = zip(sums, more, strict=True)
    return [new if old is None else old if new is None else old + new for old, new in pairs]


def _check_finite(names: list[str], means: Tensor) -> None:
    finite = means.isfinite()
    if not bool(finite.all()):
        first = names[int(finite.logical_not().nonzero()[0])]
        remedy = "it comes first; look at the weights before it, or lower the learning rate"
        raise InputError("finite activations", f"NaN or infinity in {first}", remedy)


class _Known(torch.autograd.Function):
    """A value whose gradients by the parameters are known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if g is None else upstream[0].to(g.dtype) * g for g in ctx.gradients)

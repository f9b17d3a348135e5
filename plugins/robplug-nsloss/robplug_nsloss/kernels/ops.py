"""The kernels as PyTorch operators: schema, checks, shapes, devices and derivatives.

On CUDA the Triton kernels run; on the CPU, uncompiled, those of ``numba_impl`` go over layers in single precision; else
the reference. One check serves the implementation and the fake one, so that eager mode and ``torch.compile`` refuse the
same arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from robplug.kernels import operator
from robplug_nsloss.kernels import checks, reference
from robplug_nsloss.kernels.calls import call, parts_and_signs
from robplug_nsloss.kernels.surrogate import sign_surrogate


def sphere_noise(x: Tensor, noise: Tensor, radius: float) -> Tensor:
    """Returns x + radius * noise / |noise|_2: each sample moved to a point drawn evenly from the sphere around it.

    Convention:
        Norm: over all axes but the first, summed in float32, or in float64 for a float64 x.
        A sample whose noise is 0 everywhere has no direction and stays where it is.

    Args:
        x: (N, ...), float16, bfloat16, float32 or float64, any strides.
        noise: standard normal draws of the shape of x and any of these dtypes.
        radius: of the sphere, above 0, in the units of x.

    Returns:
        (N, ...) with the dtype of x and the strides of ``torch.empty_like(x)``; rounded once, not clipped.

    Differentiable: any number of times, in x, as the identity; not in noise.

    Raises:
        TypeError: x or noise is not of a floating dtype.
        ValueError: shapes, devices or radius do not fit, or noise requires a gradient.

    Source: Fidel et al. 2020, section III-B, Algorithm 1 (perturbations of norm NsEps).
    """
    out: Tensor = call("sphere_noise", x, noise, float(radius))
    return out


def mean_abs_difference(clean: Sequence[Tensor], noisy: Sequence[Tensor]) -> Tensor:
    """Returns the sum over layers of mean |noisy - clean|: NsLoss * NsEps of one draw.

    Args:
        clean: L activations of any shapes and strides, float16, bfloat16, float32 or float64.
        noisy: the same layers' activations of the perturbed batch.

    Returns:
        (), float64 where a layer is, float32 otherwise.

    Differentiable: once, in all of them; the gradient of ``noisy`` is sign(noisy - clean) / numel, with sign(0) = 0. It
        is computed from the two, so that nothing else is kept.

    Raises:
        TypeError: a layer is not of a floating dtype.
        ValueError: there are no layers, a layer is empty, or shapes, dtypes or devices do not fit.

    Source: Fidel et al. 2020, section III-B, Algorithm 1, whose weighting cancels.
    """
    out: Tensor = _mean_abs_difference(list(clean), list(noisy))
    return out


def accumulate_signs(clean: Sequence[Tensor], noisy: Sequence[Tensor], sums: Sequence[Tensor], draw: int) -> Tensor:
    """Returns mean |noisy - clean| of each layer and adds sign(noisy - clean) to sums, in one pass over the layers.

    After N draws, -sums / numel is the gradient of the summed means in ``clean``, so that the gradient of N draws needs
    the graph of one at a time::

        for draw in range(draws):
            noisy = activations(sphere_noise(x, torch.randn_like(x), radius))
            means = accumulate_signs(clean, noisy, sums, draw)
            means.sum().backward()  # the side of the noisy activations
        (-sign_surrogate(clean, sums).sum()).backward()

    Args:
        clean: L activations of any shapes and strides, float16, bfloat16, float32 or float64; taken as constants.
        noisy: the same layers' activations of the perturbed batch.
        sums: L int8 tensors of the same shapes, written to; ``torch.empty_like(layer, dtype=torch.int8)`` is best.
        draw: number of this draw, from 0; the first one overwrites sums. An int8 holds the signs of 127 draws.

    Returns:
        (L,), float64 where a layer is, float32 otherwise.

    Differentiable: once, in noisy, by sign(noisy - clean) / numel with sign(0) = 0, as `sign_surrogate`.

    Raises:
        TypeError: a layer is not of a floating dtype.
        ValueError: there are no layers, one is empty, draw is not from 0 to 126, or shapes, dtypes or devices do not
            fit.

    Source: Fidel et al. 2020, section III-B, Algorithm 1, whose weighting cancels.
    """
    means, signs = means_and_signs(clean, noisy, sums, draw)
    if torch.is_grad_enabled() and any(layer.requires_grad for layer in noisy):
        return means + sign_surrogate(noisy, signs)
    return means


def means_and_signs(
    clean: Sequence[Tensor], noisy: Sequence[Tensor], sums: Sequence[Tensor], draw: int
) -> tuple[Tensor, list[Tensor]]:
    """Returns the means of `accumulate_signs`, without a gradient, and the int8 signs of this draw; its arguments."""
    layers = [[layer.detach() for layer in some] for some in (clean, noisy, sums)]
    if not layers[1] or not layers[1][0].is_cpu or torch.compiler.is_compiling():
        return call("accumulate_signs", *layers, draw)  # type: ignore[no-any-return]
    checks.accumulate_signs(*layers, draw)
    return reference.joined([parts_and_signs(*layer, draw) for layer in zip(*layers, strict=True)], noisy)


def _means_and_signs(clean: Sequence[Tensor], noisy: Sequence[Tensor], *_: Any) -> tuple[Tensor, list[Tensor]]:
    means = noisy[0].new_empty(len(noisy), dtype=reference.accumulator(*noisy))
    return means, [torch.empty_like(layer, dtype=torch.int8) for layer in noisy]


def _gradients(_: Tensor, clean: Sequence[Tensor], noisy: Sequence[Tensor], both: bool) -> list[Tensor]:
    return [torch.empty_like(layer) for _ in range(1 + both) for layer in noisy]


_sphere_noise = operator(
    "sphere_noise(Tensor x, Tensor noise, float radius) -> Tensor",
    reference,
    checks.sphere_noise,
    lambda x, *_: torch.empty_like(x),
)
_mean_abs_difference = operator(
    "mean_abs_difference(Tensor[] clean, Tensor[] noisy) -> Tensor",
    reference,
    checks.mean_abs_difference,
    lambda clean, noisy: noisy[0].new_empty((), dtype=reference.accumulator(*noisy)),
)
_mean_abs_difference_backward = operator(
    "mean_abs_difference_backward(Tensor g, Tensor[] clean, Tensor[] noisy, bool both) -> Tensor[]",
    reference,
    checks.mean_abs_difference_backward,
    _gradients,
)
_accumulate_signs = operator(
    "accumulate_signs(Tensor[] clean, Tensor[] noisy, Tensor(a!)[] sums, int draw) -> (Tensor, Tensor[])",
    reference,
    checks.accumulate_signs,
    _means_and_signs,
)
_add_signs = operator(
    "add_signs(Tensor g, Tensor signs, Tensor weight) -> Tensor",
    reference,
    checks.add_signs,
    lambda g, *_: torch.empty_like(g),
)


def _setup_difference(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    clean, noisy = inputs
    ctx.save_for_backward(*clean, *noisy)


def _difference_backward(ctx: Any, g: Tensor) -> tuple[Sequence[Tensor | None], list[Tensor]]:
    layers = len(ctx.saved_tensors) // 2
    clean, noisy = ctx.saved_tensors[:layers], ctx.saved_tensors[layers:]
    both = any(ctx.needs_input_grad[0])
    grads = _mean_abs_difference_backward(g, clean, noisy, both)
    return (grads[layers:] if both else [None] * layers), grads[:layers]


_sphere_noise.register_autograd(lambda ctx, g: (g, None, None))
_mean_abs_difference.register_autograd(_difference_backward, setup_context=_setup_difference)

"""The kernels as PyTorch operators: schema, checks, shapes, devices and derivatives.

On CUDA the Triton kernels run; on the CPU, uncompiled, those of ``numba_impl`` go over layers in single precision; else
the reference. One check serves the implementation and the fake one, so that eager mode and ``torch.compile`` refuse the
same arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from robplug.kernels import are_plain, operator
from robplug_nsloss.kernels import checks, reference
from robplug_nsloss.kernels.calls import added, call, parts_and_signs, relu_added, relu_passed


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
    found = [parts_and_signs(*layer, draw) for layer in zip(*layers, strict=True)]
    return reference.stacked([parts.sum() for parts, _ in found], noisy), [signs for _, signs in found]


def sign_surrogate(layers: Sequence[Tensor], signs: Sequence[Tensor]) -> Tensor:
    """Returns zeros, one a layer, with the gradient signs / numel in the layer.

    A layer that others are computed from gets its gradient by a hook when theirs has arrived, so that beside int8 signs
    no more than one is held at once. Where `torch.autograd.grad` is asked for such a layer and for what comes before
    it, the layer's gradient lacks its own part, as hooks run later; those of parameters and inputs are whole. A graph
    that is kept must be gone through in the same way again.

    Args:
        layers: L activations of any shapes and strides, float16, bfloat16, float32 or float64.
        signs: L int8 tensors of the same shapes, such as the sums of `accumulate_signs`.

    Returns:
        (L,), float64 where a layer is, float32 otherwise.

    Differentiable: once, in layers.

    Raises:
        ValueError: there are no layers, or shapes, dtypes or devices do not fit.
        RuntimeError: in the backward pass, with ``create_graph=True``, or if autograd has no gradient for a layer that
            others are computed from.
    """
    checks.surrogate(layers, signs)
    inner = _inner(layers)
    waiting: dict[int, tuple[Tensor, Tensor]] = {}
    zeros: Tensor = _Surrogate.apply(list(signs), inner, waiting, *layers)  # type: ignore[no-untyped-call]
    for number in inner:
        node = layers[number].grad_fn
        if isinstance(node, _ReLU._backward_cls):  # type: ignore[attr-defined]
            node.own.append((number, waiting))
        else:
            layers[number].register_hook(_hook(number, waiting))  # type: ignore[no-untyped-call]
    return zeros


def relu(x: Tensor) -> Tensor:
    """Returns the ReLU of x, whose backward pass adds the part of `sign_surrogate` as it goes, and not in another.

    Who asks for the gradient of the result itself, or hooks it, does not see that part: for passes of one's own.
    """
    if not (x.requires_grad and are_plain(x)):
        return x.relu()
    out: Tensor = _ReLU.apply(x)  # type: ignore[no-untyped-call]
    return out


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


class _Surrogate(torch.autograd.Function):
    """Zeros; the gradients of the layers, but for those that wait for a hook."""

    @staticmethod
    def forward(
        ctx: Any, signs: list[Tensor], inner: list[int], waiting: dict[int, tuple[Tensor, Tensor]], *layers: Tensor
    ) -> Tensor:
        ctx.inner, ctx.waiting = inner, waiting
        ctx.dtypes = [layer.dtype for layer in layers]
        ctx.save_for_backward(*signs)
        return layers[0].new_zeros(len(layers), dtype=reference.accumulator(*layers))

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None] * len(g)
        for number, (signs, weight) in enumerate(zip(ctx.saved_tensors, g.unbind(), strict=True)):
            if number in ctx.inner:
                ctx.waiting[number] = signs, weight
            elif ctx.needs_input_grad[3 + number]:
                zeros = torch.zeros_like(signs, dtype=ctx.dtypes[number])
                found[number] = added(zeros, signs, weight)
        return None, None, None, *found


class _ReLU(torch.autograd.Function):
    """relu(x), a node of whose graph takes on what a hook of its result would do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.relu()
        ctx.save_for_backward(out)
        ctx.own = []
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        waiting = [waiting.pop(number) for number, waiting in ctx.own if number in waiting]
        if not waiting:
            return relu_passed(g, out)
        _check_once(g)
        for signs, weight in waiting[1:]:  # of a layer that is named more than once
            g = added(g, signs, weight)
        return relu_added(g, *waiting[0], out)


def _hook(number: int, waiting: dict[int, tuple[Tensor, Tensor]]) -> Callable[[Tensor | None], Tensor | None]:
    """Returns what adds a layer's own gradient to the one that arrives from the layers behind it.

    It must not hold the layer, which holds it.
    """

    def hook(g: Tensor | None) -> Tensor | None:
        if number not in waiting:
            return None
        signs, weight = waiting.pop(number)
        if g is None:
            remedy = "a function behind it returns None for it: return zeros there, or leave the layer out"
            raise RuntimeError(f"expected a gradient for layer {number} from the layers behind it, got None; {remedy}")
        _check_once(g)
        return added(g, signs, weight)

    return hook


def _check_once(g: Tensor) -> None:
    if torch.is_grad_enabled() and g.requires_grad:
        raise RuntimeError("expected to be differentiated once, got create_graph=True; use mean_abs_difference")


def _inner(layers: Sequence[Tensor]) -> list[int]:
    """Returns the numbers of the layers that others are computed from, as autograd's graph has it."""
    reached: set[tuple[Any, int]] = set()
    nodes = [layer.grad_fn for layer in layers]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        for edge in node.next_functions if node is not None else ():
            if edge[0] is None:  # a constant
                continue
            reached.add(edge)
            if edge[0] not in seen:
                seen.add(edge[0])
                nodes.append(edge[0])
    return [number for number, layer in enumerate(layers) if (layer.grad_fn, layer.output_nr) in reached]

"""A gradient that is known beforehand, added where a layer's own arrives: signs / numel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from robplug_nsloss.kernels import checks, reference
from robplug_nsloss.kernels.calls import added, is_tracked, relu_added, relu_passed


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
    if not is_tracked(x):
        return x.relu()
    out: Tensor = _relu(x)
    return out


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


_relu = super(torch.autograd.Function, _ReLU).apply  # without a look for transforms, of which ``are_plain`` knows


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

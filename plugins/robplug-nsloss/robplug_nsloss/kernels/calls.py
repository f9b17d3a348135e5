"""Which implementation of a kernel is called: on the CPU, an operator's call costs more than a small layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robplug.kernels import are_plain, cpu_kernels
from robplug_nsloss.kernels import checks, reference


def call(name: str, *args: Any) -> Any:
    """Calls an operator, or on the CPU the reference itself: for a small layer, the call costs more than the layer."""
    first = args[0] if isinstance(args[0], Tensor) else next(iter(args[0]), None)
    if torch.compiler.is_compiling() or (first is not None and not first.is_cpu):
        return getattr(torch.ops.robplug_nsloss, name)(*args)
    getattr(checks, name)(*args)
    return getattr(reference, name)(*args)


def parts_and_signs(clean: Tensor, noisy: Tensor, sums: Tensor, draw: int) -> tuple[Tensor, Tensor]:
    """Returns parts of mean |noisy - clean|, to be added up, and sign(noisy - clean), which is added to sums.

    To be called on the CPU as soon as a layer is computed: it is in the cache then, and Python is not, so that all that
    can wait is left for later.
    """
    if is_native(noisy, clean, sums) and clean.dtype == noisy.dtype and 0 <= draw < checks.DRAWS:
        return cpu_kernels(reference).accumulate_signs(clean, noisy, sums, draw)  # type: ignore[no-any-return]
    checks.accumulate_signs([clean], [noisy], [sums], draw)
    return reference.accumulate_one(clean, noisy, sums, draw)


def added(g: Tensor, signs: Tensor, weight: Tensor) -> Tensor:
    """Returns g + weight * signs / numel."""
    if is_native(g, signs):
        return cpu_kernels(reference).add_signs(g, signs, weight)  # type: ignore[no-any-return]
    return call("add_signs", g, signs, weight)  # type: ignore[no-any-return]


def relu_added(g: Tensor, signs: Tensor, weight: Tensor, activation: Tensor) -> Tensor:
    """Returns `added` where the ReLU behind an activation passes it, and 0 elsewhere."""
    if is_native(g, activation, signs):
        return cpu_kernels(reference).relu_add_signs(g, signs, weight, activation)  # type: ignore[no-any-return]
    checks.add_signs(g, signs, weight)
    return reference.relu_add_signs(g, signs, weight, activation)


def relu_passed(g: Tensor, activation: Tensor) -> Tensor:
    """Returns a gradient behind a ReLU as it is before it."""
    return torch.ops.aten.threshold_backward(g, activation, 0)  # type: ignore[no-any-return]


def norm_gradients(
    g: Tensor, x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients by x, weight and bias of batch norm that `is_native_norm`; differentiable where asked."""
    if torch.is_grad_enabled() or g.dtype != x.dtype or not g.is_contiguous() or not are_plain(g):
        known = mean, variance, None, None, False, eps, [True, True, True]
        return torch.ops.aten.native_batch_norm_backward(g, x, weight, *known)  # type: ignore[no-any-return]
    backward = cpu_kernels(reference).batch_norm_backward
    return backward(g, x, mean, variance, weight, eps)  # type: ignore[no-any-return]


def is_native(x: Tensor, *others: Tensor) -> bool:
    """Returns whether the kernels for the CPU can go over tensors together: x single, the last int8, laid out alike."""
    if x.dtype != torch.float32 or others[-1].dtype != torch.int8 or not x.numel():
        return False
    shape, strides = x.shape, x.stride()
    for other in others:
        if other.shape != shape or other.stride() != strides:
            return False
    dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return dense and are_plain(x, *others)


def is_tracked(x: Tensor) -> bool:
    """Returns whether x has a gradient that the kernels for the CPU may compute."""
    return x.requires_grad and are_plain(x)


def is_native_norm(x: Tensor, mean: Any, variance: Any, weight: Any, bias: Any, eps: Any) -> bool:
    """Returns whether the kernel for the CPU can differentiate batch norm by known statistics.

    Anything wrong is left to PyTorch to refuse, and the call to modes that replace functions. Checkpoints, which work
    by hooks for saved tensors, compare these with what PyTorch's own batch norm saves.
    """
    if not are_plain(x, mean, variance, weight, bias) or mean.requires_grad or variance.requires_grad:
        return False
    if not x.requires_grad or x.dtype != torch.float32 or x.dim() < 3 or not x.numel() or not x.is_contiguous():
        return False
    channels = x.shape[1:2]
    for row in (mean, variance, weight, bias):
        if row.shape != channels or row.dtype != torch.float32 or not row.is_contiguous():
            return False
    if type(eps) is not float or torch._C._len_torch_function_stack():
        return False
    return _saved_tensors_hooks(False) is None


# PyTorch 2.6 does not tell
_saved_tensors_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: "unknown")

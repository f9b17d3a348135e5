"""The checks of the operators' arguments: what was expected, the value and the remedy.

One function per operator, with the operator's arguments; it serves the implementation and the fake one alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from robplug_advprop.kernels.reference import accumulator

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def mixture(x: Tensor, weight: Tensor, bias: Tensor, sizes: Sequence[int], eps: float, relu: bool) -> None:
    """Checks the arguments of mixture_batch_norm."""
    groups(x, sizes)
    for name, tensor in (("weight", weight), ("bias", bias)):
        _per_group(name, tensor, x, sizes)
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"expected a finite eps >= 0, got {eps}; 1e-5 is usual")


def mixture_backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    out: Tensor | None,
    sizes: Sequence[int],
    eps: float,
) -> None:
    """Checks the arguments of mixture_batch_norm_backward."""
    mixture(x, weight, weight, sizes, eps, relu=False)
    for name, tensor in (("mean", mean), ("var", var)):
        _per_group(name, tensor, x, sizes)
    for name, other in (("g", g), ("out", out)):
        if other is not None and (other.shape != x.shape or other.device != x.device):
            got = f"{tuple(other.shape)} on {other.device}"
            raise ValueError(f"expected {name} of shape {tuple(x.shape)} on {x.device}, as x is, got {got}")


def groups(x: Tensor, sizes: Sequence[int]) -> None:
    """Checks a batch and the sizes of its groups."""
    if x.dtype not in DTYPES:
        raise TypeError(f"expected x of float16, bfloat16, float32 or float64, got {x.dtype}; convert it: x.float()")
    if x.dim() < 2 or x.shape[1] < 1:
        raise ValueError(f"expected x of shape (N, C, ...) with at least one channel, got {tuple(x.shape)}")
    if not sizes or min(sizes) < 1:
        raise ValueError(f"expected groups of at least one sample, got sizes {list(sizes)}; leave empty groups out")
    if sum(sizes) != x.shape[0]:
        remedy = "give the sizes of the groups in the order of the batch"
        raise ValueError(f"expected a batch of {sum(sizes)} samples, sizes {list(sizes)}, got {x.shape[0]}; {remedy}")
    each = math.prod(x.shape[2:])
    if min(sizes) * each < 2:
        got = f"sizes {list(sizes)} with {each} value{'' if each == 1 else 's'} a sample"
        remedy = "make the batch larger (drop_last=True), or use the eval mode"
        raise ValueError(f"expected at least 2 values a channel in each group in training, got {got}; {remedy}")


def _per_group(name: str, tensor: Tensor, x: Tensor, sizes: Sequence[int]) -> None:
    shape, dtype = (len(sizes), x.shape[1]), accumulator(x)
    if tuple(tensor.shape) != shape:
        remedy = "a row for each group"
        raise ValueError(f"expected {name} of shape {shape}, got {tuple(tensor.shape)}; {remedy}")
    if tensor.dtype != dtype:
        raise TypeError(f"expected {name} of {dtype} beside x of {x.dtype}, got {tensor.dtype}; convert it")
    if tensor.device != x.device:
        remedy = f"move one: {name}.to({str(x.device)!r})"
        raise ValueError(f"expected {name} on {x.device}, where x is, got {tensor.device}; {remedy}")

"""The kernels in plain PyTorch; what runs where no kernel does.

`definition` and `gradients` are the formulas, which autograd can go through any number of times. The other two have the
same results without a graph, and leave the passes over a group to the library: its slices are read and written in
place, so that nothing is split and joined.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator(x: Tensor) -> torch.dtype:
    """Returns the dtype to compute in: float32, or float64 for a float64 tensor."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def definition(x: Tensor, weight: Tensor, bias: Tensor, sizes: list[int], eps: float, relu: bool) -> Tensor:
    """Returns the groups of x, each normalised by its own statistics, times its weight, plus its bias."""
    groups = []
    for k, group in enumerate(x.to(accumulator(x)).split(sizes)):
        normal, _ = _normal(group, eps)
        groups.append(normal * _row(weight, k, x) + _row(bias, k, x))
    out = torch.cat(groups).to(x.dtype)
    return out.relu() if relu else out


def gradients(
    g: Tensor, x: Tensor, weight: Tensor, out: Tensor | None, sizes: list[int], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of sum(g * definition) with respect to x, weight and bias.

    With n values in a channel of a group, z the normalised ones and s what they were divided by:
    grad_bias = sum g, grad_weight = sum g z, grad_x = weight / s (g - grad_bias / n - z grad_weight / n).

    Args:
        g: (N, C, ...).
        x: (N, C, ...).
        weight: (K, C).
        out: the result if it went through a ReLU, which passes a gradient where it is positive; else None.
        sizes: of the K groups.
        eps: as in the definition.
    """
    dtype, dims = accumulator(x), _all_but_channels(x)
    g = g.to(dtype) if out is None else g.to(dtype).masked_fill(out <= 0, 0)
    found = []
    for k, (upstream, group) in enumerate(zip(g.split(sizes), x.to(dtype).split(sizes), strict=True)):
        normal, inverse = _normal(group, eps)
        count = group.numel() // group.shape[1]
        by_bias, by_weight = upstream.sum(dims, keepdim=True), (upstream * normal).sum(dims, keepdim=True)
        by_x = _row(weight, k, x) * inverse * (upstream - (by_bias + normal * by_weight) / count)
        found.append((by_x, by_weight.flatten(), by_bias.flatten()))
    by_x, by_weight, by_bias = zip(*found, strict=True)
    return torch.cat(by_x).to(x.dtype), torch.stack(by_weight), torch.stack(by_bias)


def mixture_batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, sizes: list[int], eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `definition`, and mean and unbiased variance of each channel of each group, (K, C)."""
    out = torch.empty_like(x)
    # with momentum 1, running statistics are those of the batch; zeros, as what is there before counts 0 times
    mean, var = torch.zeros_like(weight), torch.zeros_like(weight)
    saved = torch.empty_like(weight[0]), torch.empty_like(weight[0])
    in_place = is_dense(x)
    for k, (group, result) in enumerate(zip(x.split(sizes), out.split(sizes), strict=True)):
        arguments = (group, weight[k], bias[k], mean[k], var[k], True, 1.0, eps)
        if in_place:
            torch.native_batch_norm(*arguments, out=(result, *saved))
        else:
            result.copy_(torch.native_batch_norm(*arguments)[0])
    return out.relu_() if relu else out, mean, var


def mixture_batch_norm_backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    out: Tensor | None,
    sizes: list[int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `gradients`, given the statistics that the forward pass returned."""
    outs = [None] * len(sizes) if out is None else out.split(sizes)
    rows = weight, mean, inverse_deviation(x, var, sizes, eps)
    groups = zip(g.split(sizes), x.split(sizes), outs, *rows, strict=True)
    parts, by_weight, by_bias = zip(*(group_backward(*group) for group in groups), strict=True)
    by_x = torch.empty_like(x)
    torch.cat(parts, out=by_x)
    return by_x, torch.stack(by_weight), torch.stack(by_bias)


def group_backward(
    g: Tensor, x: Tensor, out: Tensor | None, weight: Tensor, mean: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of a group with respect to its values, weight and bias."""
    if out is not None:
        g = torch.ops.aten.threshold_backward(g, out, 0)
    by_x, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(
        g, x, weight, None, None, mean, inverse, True, 0.0, [True, True, True]
    )
    return by_x, by_weight, by_bias


def inverse_deviation(x: Tensor, var: Tensor, sizes: list[int], eps: float) -> Tensor:
    """Returns (K, C): 1 / sqrt(variance + eps), given the unbiased variances."""
    each = x.numel() // (x.shape[0] * x.shape[1])
    shares = [1 - 1 / (size * each) for size in sizes]
    return torch.addcmul(var.new_tensor(eps), var, var.new_tensor(shares)[:, None]).rsqrt()


def _normal(group: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns the normalised group and 1 / (what it was divided by)."""
    dims = _all_but_channels(group)
    centred = group - group.mean(dims, keepdim=True)
    inverse = (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    return centred * inverse, inverse


def is_dense(x: Tensor) -> bool:
    """Returns whether the library writes to where it is told: with other strides its results on the CPU are wrong."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim(), torch.contiguous_format)
    return x.is_contiguous() or x.is_contiguous(memory_format=last)


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _row(tensor: Tensor, k: int, x: Tensor) -> Tensor:
    return tensor[k].view(-1, *[1] * (x.dim() - 2))

"""The definition of the kernels in plain PyTorch, forward and backward; what runs where no kernel does.

Values are computed in float32, or in float64 where they are float64, and rounded once at the end. The layers of a
network are worked on in parts that stay in the cores' caches, so that no difference of two layers is ever held whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 2**19  # values whose differences stay in the cores' caches


def accumulator(*tensors: Tensor) -> torch.dtype:
    """Returns the dtype to compute in: float64 where a tensor has it, float32 otherwise."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def alike(tensor: Tensor, other: Tensor) -> Tensor:
    """Returns the tensor with the strides of ``torch.empty_like(other)``, copied only where it has others."""
    strides = torch.empty_like(other, device="meta").stride()
    if tensor.stride() == strides:
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def sphere_noise(x: Tensor, noise: Tensor, radius: float) -> Tensor:
    """Returns x + radius * noise / |noise|_2, with one norm a sample; a sample whose noise is 0 stays where it is."""
    dtype = accumulator(x)
    noise = noise.to(dtype)
    norm = torch.linalg.vector_norm(noise.flatten(1), dim=1)
    scale = (radius / norm.masked_fill(norm == 0, 1.0)).view(-1, *[1] * (x.dim() - 1))
    return alike(torch.addcmul(x.to(dtype), noise, scale).to(x.dtype), x)


def mean_abs_difference(clean: list[Tensor], noisy: list[Tensor]) -> Tensor:
    """Returns the sum over the layers of mean |noisy - clean|, ()."""
    totals = [
        _mean([_difference(*parts).abs_().sum() for parts in _parts(other, one, other)], one)
        for one, other in zip(clean, noisy, strict=True)
    ]
    return stacked(totals, noisy).sum()


def mean_abs_difference_backward(g: Tensor, clean: list[Tensor], noisy: list[Tensor], both: bool) -> list[Tensor]:
    """Returns the gradients of ``noisy``, g * sign(noisy - clean) / numel, and then, if wanted, those of ``clean``."""
    grads = []
    for one, other in zip(clean, noisy, strict=True):
        outs = [torch.empty_like(other) for _ in range(1 + both)]
        scale = g.item() / other.numel()
        for second, first, *results in _parts(other, other, one, *outs):
            signs = _difference(second, first).sign_()
            for result, slope in zip(results, (scale, -scale), strict=False):
                torch.mul(signs, slope, out=result)
        grads.append(outs)
    return [grad for side in zip(*grads, strict=True) for grad in side]


def accumulate_signs(
    clean: list[Tensor], noisy: list[Tensor], sums: list[Tensor], draw: int
) -> tuple[Tensor, list[Tensor]]:
    """Returns mean |noisy - clean| a layer, (L,), and sign(noisy - clean), which is added to sums; draw 0 sets them."""
    return joined([accumulate_one(*layer, draw) for layer in zip(clean, noisy, sums, strict=True)], noisy)


def accumulate_one(clean: Tensor, noisy: Tensor, sums: Tensor, draw: int) -> tuple[Tensor, Tensor]:
    """Returns parts of the mean of one layer, whose sum it is, and the signs; see `accumulate_signs`."""
    laid, signs = alike(sums, noisy), torch.empty_like(noisy, dtype=torch.int8)
    absolute = []
    for second, first, sum_part, sign_part in _parts(noisy, noisy, clean, laid, signs):
        difference = _difference(second, first)
        sign_part.copy_(difference.sign())
        if draw == 0:
            sum_part.copy_(sign_part)
        else:
            sum_part.add_(sign_part)
        absolute.append(difference.abs_().sum())
    if laid is not sums:
        sums.copy_(laid)
    return torch.stack(absolute) / noisy.numel(), signs


def joined(found: Sequence[tuple[Tensor, Tensor]], layers: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Returns the means, (L,), and the signs of what `accumulate_one` found in each layer."""
    # not every device has double precision
    means = [parts.sum(dtype=torch.float64 if parts.is_cpu else None) for parts, _ in found]
    return stacked(means, layers), [signs for _, signs in found]


def add_signs(g: Tensor, signs: Tensor, weight: Tensor) -> Tensor:
    """Returns g + weight * signs / numel, with the dtype of g."""
    dtype, scale, out = accumulator(g), weight.item() / g.numel(), torch.empty_like(g)
    for result, part, sign in _parts(g, out, g, signs):
        torch.add(part, sign.to(dtype), alpha=scale, out=result)
    return out


def relu_add_signs(g: Tensor, signs: Tensor, weight: Tensor, activation: Tensor) -> Tensor:
    """Returns what `add_signs` returns where the activation is not 0, and 0 elsewhere."""
    dtype, scale, out = accumulator(g), weight.item() / g.numel(), torch.empty_like(g)
    for result, part, sign, passed in _parts(g, out, g, signs, activation):
        torch.add(part, sign.to(dtype), alpha=scale, out=result)
        torch.ops.aten.threshold_backward.grad_input(result, passed, 0, grad_input=result)
    return out


def _parts(like: Tensor, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Returns the tensors, laid out as like would be, in flat parts; views wherever they lie so already."""
    split = [alike(tensor, like).as_strided((tensor.numel(),), (1,)).split(CHUNK) for tensor in tensors]
    return list(zip(*split, strict=True))


def _difference(second: Tensor, first: Tensor) -> Tensor:
    """Returns second - first, which may be written on, in the dtype to compute in."""
    return second.to(accumulator(second)) - first


def _mean(sums: list[Tensor], layer: Tensor) -> Tensor:
    return torch.stack(sums).sum() / layer.numel()


def stacked(means: Sequence[Tensor], layers: Sequence[Tensor]) -> Tensor:
    """Returns the layers' means as one tensor, float64 where a layer is, float32 otherwise."""
    return torch.stack([mean.to(accumulator(*layers)) for mean in means])

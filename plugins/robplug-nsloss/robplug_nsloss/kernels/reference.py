"""The definition of the kernels in plain PyTorch, forward and backward; what runs wherever Triton does not.

Values are computed in float32, or in float64 where they are float64, and rounded once at the end. The layers of a
network are worked on in parts that stay in a core's cache, so that no difference of two layers is ever held whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

CHUNK = 2**17  # values whose differences stay in a core's cache


def accumulator(*tensors: Tensor) -> torch.dtype:
    """Returns the dtype to compute in: float64 where a tensor has it, float32 otherwise."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def alike(tensor: Tensor, other: Tensor) -> Tensor:
    """Returns the tensor with the strides of ``torch.empty_like(other)``, copied only where it has others."""
    strides = torch.empty_like(other, device="meta").stride()
    if tensor.stride() == strides:
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def flat(tensor: Tensor) -> Tensor:
    """Returns the values of a tensor without gaps in the order of memory, as a view."""
    return tensor.as_strided((tensor.numel(),), (1,))


def sphere_noise(x: Tensor, noise: Tensor, radius: float) -> Tensor:
    """Returns x + radius * noise / |noise|_2, with one norm a sample; a sample whose noise is 0 stays where it is."""
    dtype = accumulator(x)
    noise = noise.to(dtype)
    norm = torch.linalg.vector_norm(noise.flatten(1), dim=1)
    scale = (radius / norm.masked_fill(norm == 0, 1.0)).view(-1, *[1] * (x.dim() - 1))
    return alike(torch.addcmul(x.to(dtype), noise, scale).to(x.dtype), x)


def mean_abs_difference(clean: Sequence[Tensor], noisy: Sequence[Tensor]) -> Tensor:
    """Returns the sum over the layers of mean |noisy - clean|, ()."""
    totals = [
        _mean([piece.abs_().sum() for piece, *_ in _differences(one, other)], one)
        for one, other in zip(clean, noisy, strict=True)
    ]
    return _stacked(totals, noisy).sum()


def mean_abs_difference_backward(
    g: Tensor, clean: Sequence[Tensor], noisy: Sequence[Tensor], both: bool
) -> list[Tensor]:
    """Returns the gradients of ``noisy``, g * sign(noisy - clean) / numel, and then, if wanted, those of ``clean``."""
    grads = []
    for one, other in zip(clean, noisy, strict=True):
        out = torch.empty_like(other)
        for piece, result in _differences(one, other, out):
            result.copy_(piece.sign_().mul_(g.item() / other.numel()))
        grads.append(out)
    return grads + [grad.neg() for grad in grads] if both else grads


def accumulate_signs(
    clean: Sequence[Tensor], noisy: Sequence[Tensor], sums: Sequence[Tensor], draw: int
) -> tuple[Tensor, list[Tensor]]:
    """Returns mean |noisy - clean| a layer, (L,), and sign(noisy - clean), which is added to sums; draw 0 sets them."""
    means, signs = [], [torch.empty_like(layer, dtype=torch.int8) for layer in noisy]
    for one, other, total, sign in zip(clean, noisy, sums, signs, strict=True):
        laid = alike(total, other)
        parts = []
        for piece, sum_part, sign_part in _differences(one, other, laid, sign):
            sign_part.copy_(piece.sign())
            if draw == 0:
                sum_part.copy_(sign_part)
            else:
                sum_part.add_(sign_part)
            parts.append(piece.abs_().sum())
        means.append(_mean(parts, other))
        if laid is not total:
            total.copy_(laid)
    return _stacked(means, noisy), signs


def add_signs(g: Tensor, signs: Tensor, weight: Tensor) -> Tensor:
    """Returns g + weight * signs / numel, with the dtype of g."""
    dtype, scale, out = accumulator(g), weight.item() / g.numel(), torch.empty_like(g)
    tensors = (out, alike(g, g), alike(signs, g))
    for result, part, sign in zip(*(flat(tensor).split(CHUNK) for tensor in tensors), strict=True):
        if g.dtype == dtype:
            torch.add(part, sign.to(dtype), alpha=scale, out=result)
        else:
            result.copy_(part.to(dtype).add_(sign, alpha=scale))
    return out


def _differences(clean: Tensor, noisy: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yields noisy - clean in parts that may be written on, with the same parts of others, which lie as noisy would."""
    dtype = accumulator(noisy)
    tensors = (alike(noisy, noisy), alike(clean, noisy), *others)
    for second, first, *parts in zip(*(flat(tensor).split(CHUNK) for tensor in tensors), strict=True):
        yield second.to(dtype) - first, *parts


def _mean(sums: list[Tensor], layer: Tensor) -> Tensor:
    return torch.stack(sums).sum() / layer.numel()


def _stacked(means: list[Tensor], layers: Sequence[Tensor]) -> Tensor:
    return torch.stack([mean.to(accumulator(*layers)) for mean in means])

"""Statistics of a batch that several processes share, differentiable any number of times.

torch's SyncBatchNorm refuses tensors on the CPU, and knows batches of one part only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def moments(parts: Sequence[Tensor], process_group: Any = None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns number of values, mean and biased variance of each channel of each part, over all processes.

    Every process has its share of each part, which may be empty. One collective forward and one backward: each process
    shows number, mean and sum of squared deviations, and all put them together in the same order.

    Args:
        parts: K tensors (N_k, C, ...), each N_k >= 0; K and C are those of every process.
        process_group: the processes; None means all.

    Returns:
        (K,), (K, C) and (K, C); zeros for a part that is empty everywhere.

    Differentiable: any number of times; the gradient is that of the sum of what the processes differentiate.

    Source: Chan, Golub and LeVeque 1979, Updating formulae and a pairwise algorithm for computing sample variances.
    """
    own = torch.stack([_summary(part) for part in parts])
    shown = [torch.zeros_like(own) for _ in range(dist.get_world_size(process_group))]
    shown[dist.get_rank(process_group)] = own
    counts, means, squares = _AllReduce.apply(torch.stack(shown), process_group).unbind(2)
    count = counts.sum(0)
    mean = (counts * means).sum(0) / count.clamp_min(1)
    total = (squares + counts * (means - mean).square()).sum(0)
    return count[:, 0], mean, total / count.clamp_min(1)


def _summary(part: Tensor) -> Tensor:
    """Returns (3, C): number of values, mean, and sum of squared deviations from it."""
    dims, count = [0, *range(2, part.dim())], part.numel() // part.shape[1]
    mean = part.sum(dims, keepdim=True) / max(count, 1)
    squares = (part - mean).square().sum(dims)
    return torch.stack([torch.full_like(squares, count), mean.flatten(), squares])


class _AllReduce(torch.autograd.Function):
    """The sum over processes. Each adds to the loss of all, so that the gradient is a sum over processes, too."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, process_group: Any) -> Tensor:
        ctx.process_group = process_group
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=process_group)
        return total

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _AllReduce.apply(g, ctx.process_group), None

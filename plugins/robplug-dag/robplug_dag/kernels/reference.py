"""The definition of the kernels in plain PyTorch; what runs wherever Triton does not.

A target is a pixel or a proposal with a label and a goal, two different classes. Classes are axis 1 of logits
(N, C, H, W) and the last axis of logits (N, R, C).
"""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator(x: Tensor) -> torch.dtype:
    """Returns the dtype in which perturbations add up: float32, or float64 where the images have it."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def class_axis(logits: Tensor) -> int:
    """Returns which axis of the logits counts classes."""
    return 1 if logits.dim() == 4 else 2


def memory_format(x: Tensor) -> torch.memory_format:
    """Returns how a result of the shape of x lies: channels last if x has them last, contiguous otherwise."""
    last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def empty(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Returns room for a result of the shape of x."""
    return torch.empty_like(x, dtype=dtype, memory_format=memory_format(x))


def dense_adversary_grad(logits: Tensor, labels: Tensor, goals: Tensor, until_goal: bool) -> tuple[Tensor, Tensor]:
    """Returns the gradient of the sum over active targets of f_goal - f_label, like the logits, and their number, (N,).

    An argmax over classes that are not the last axis takes 60 times as long as a maximum. So each target's class is
    compared with the best of the others, in memory that later holds the gradient; only ties need an argmax.
    """
    axis, classes = class_axis(logits), logits.shape[class_axis(logits)]
    valid = (labels >= 0) & (labels < classes) & (goals >= 0) & (goals < classes) & (labels != goals)
    label, goal = ((part * valid).unsqueeze(axis) for part in (labels, goals))
    watched = goal if until_goal else label
    own = logits.gather(axis, watched)
    lowest = logits.new_full((), -torch.inf).expand_as(watched)  # as a number it takes four times as long
    out = empty(logits).copy_(logits).scatter_(axis, watched, lowest)
    rival = out.amax(axis, keepdim=True)
    predicted = own > rival
    tied = (own == rival) & valid.unsqueeze(axis)
    if tied.any():
        rows = logits.movedim(axis, -1)[tied.squeeze(axis)]
        predicted[tied] = rows.argmax(-1) == watched[tied]
    active = (predicted ^ until_goal).logical_and_(valid.unsqueeze(axis))
    signs = active.to(logits.dtype)
    out.zero_().scatter_(axis, goal, signs).scatter_(axis, label, signs.neg_())
    unknown = torch.maximum(own, rival).isnan().logical_and_(valid.unsqueeze(axis)).flatten(1).any(1)
    return out, active.flatten(1).sum(1).masked_fill_(unknown, -1)


def normalised_step(
    gradient: Tensor, r: Tensor, x: Tensor, gamma: float, low: float, high: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns r + gamma * g / max|g| per image, the image x + r cut to [low, high], and max|g|, (N,)."""
    acc = r.dtype
    rest = [1] * (x.dim() - 1)
    flat = gradient.flatten(1) if gradient.numel() else gradient.new_zeros(len(x), 1)
    size = torch.maximum(-flat.amin(1), flat.amax(1)).to(acc)  # aminmax takes 20 times as long
    direction = gradient.to(acc) / size.masked_fill(size == 0, 1).view(-1, *rest)
    moved = torch.add(r, direction, alpha=gamma, out=empty(x, acc))
    image = torch.add(x.to(acc), moved, out=empty(x, acc)).clamp_(low, high)
    return moved, image.to(x.dtype), size

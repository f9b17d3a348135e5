"""Time and peak memory of resize_pad beside interpolate and pad, plain gathers and torch.compile, in one run.

    python plugins/robplug-di2/benchmarks/kernels.py

Forward, backward and both, on the CPU, or on the GPU where there is one. Where each image has draws of its own, a
ratio is relative to interpolate and pad image by image; where all share one, as in the paper, to one call for all.
That call is compiled for one size: for each further size it would be compiled again. Below 1 is faster.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # read when torch is imported

import torch
import torch.nn.functional as F
from torch import Tensor

from robplug_di2 import InputDiversity, resize_pad
from robplug_di2.kernels.ops import Mode

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from kernel_case import Case, Function, Shape, benchmark

OURS, LOOP, BATCH = "robplug-di2", "interpolate and pad, image by image", "interpolate and pad, the batch"
GATHER, COMPILED = "gather in eager PyTorch", "torch.compile"
SHAPES: dict[str, tuple[Shape, ...]] = {
    "cpu": ((128, 1, 28, 28), (128, 3, 32, 32), (16, 3, 299, 299)),
    "cuda": ((128, 3, 32, 32), (32, 3, 299, 299), (256, 3, 299, 299)),
}
FILL = 0.5


def interpolated(x: Tensor, size: list[int], offset: list[int], canvas: int, mode: Mode) -> Tensor:
    """Returns a batch resized and padded with one draw."""
    (height, width), (top, left) = size, offset
    small = F.interpolate(x, size, mode=mode, align_corners=False if mode == "bilinear" else None)
    return F.pad(small, [left, canvas - width - left, top, canvas - height - top], value=FILL)


def one_by_one(x: Tensor, size: Tensor, offset: Tensor, canvas: int, mode: Mode) -> Tensor:
    """Each image with its own draw, as one types it."""
    draws = zip(x.split(1), size.tolist(), offset.tolist(), strict=True)
    return torch.cat([interpolated(image, *draw, canvas, mode) for image, *draw in draws])


def gathered(x: Tensor, size: Tensor, offset: Tensor, canvas: int, mode: Mode) -> Tensor:
    """All images at once by indexing: what torch.compile can fuse."""
    side, image = x.shape[2], torch.arange(len(x), device=x.device)[:, None, None]
    line = torch.arange(canvas, device=x.device) - offset[:, :, None]
    shown = (line >= 0) & (line < size[:, :, None])
    line, size = line.clamp_min(0), size[:, :, None]
    if mode == "nearest":
        row, col = (line * side // size).clamp_max(side - 1).unbind(1)
        out = x.permute(0, 2, 3, 1)[image, row[:, :, None], col[:, None, :]]
    else:
        place = (((2 * line + 1) * side - size).clamp_min(0) / (2 * size)).clamp_max(side - 1).to(x.dtype)
        first = place.long()
        (down, along), second = (place - first).unbind(1), (first + 1).clamp_max(side - 1)
        (up, left), (low, right) = first.unbind(1), second.unbind(1)
        pixels = x.permute(0, 2, 3, 1)
        ul, ur, ll, lr = (pixels[image, r[:, :, None], c[:, None, :]] for r in (up, low) for c in (left, right))
        along = along[:, None, :, None]
        out = torch.lerp(torch.lerp(ul, ur, along), torch.lerp(ll, lr, along), down[:, :, None, None])
    inside = shown[:, 0, :, None] & shown[:, 1, None, :]
    return torch.where(inside[:, None], out.permute(0, 3, 1, 2), FILL)


def cases(shape: Shape, device: str, compiled: bool) -> list[Case]:
    """Returns what is measured on images of one shape: own draws and shared ones, in both modes."""
    count, side = shape[0], shape[2]
    _, canvas = InputDiversity().sides(side)
    x = torch.rand(shape, device=device, requires_grad=True)
    size = torch.randint(side, canvas, (count, 1)).expand(count, 2)
    offset = (torch.rand(count, 2) * (canvas - size)).long()
    own = size.contiguous().to(device), offset.to(device)
    shared = tuple(pair[:1].to(device).expand(count, 2) for pair in (size, offset))
    drawn = size[0].tolist(), offset[0].tolist()
    label = "x".join(map(str, shape))
    found = []
    for mode in ("nearest", "bilinear"):
        ours = functools.partial(resize_pad, canvas=(canvas, canvas), mode=mode, fill=FILL)
        loop = functools.partial(one_by_one, canvas=canvas, mode=mode)
        gather = functools.partial(gathered, canvas=canvas, mode=mode)
        contenders: dict[str, Function] = {OURS: ours, LOOP: loop, GATHER: gather}
        if compiled:
            contenders[COMPILED] = torch.compile(gather, dynamic=False)
        found.append(Case(f"{mode} {label}, own draws", OURS, LOOP, contenders, (x, *own), loop))
        fixed = functools.partial(interpolated, size=drawn[0], offset=drawn[1], canvas=canvas, mode=mode)
        fast = torch.compile(fixed, dynamic=False) if compiled else None
        contenders = {OURS: ours, BATCH: lambda x, size, offset, fixed=fixed: fixed(x)}
        if fast is not None:
            contenders[COMPILED] = lambda x, size, offset, fast=fast: fast(x)
        found.append(Case(f"{mode} {label}, one draw", OURS, BATCH, contenders, (x, *shared), contenders[BATCH]))
    return found


if __name__ == "__main__":
    benchmark(OURS, SHAPES, cases, Path(__file__).parent)

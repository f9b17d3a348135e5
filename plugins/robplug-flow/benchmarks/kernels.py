"""Time and peak memory of the kernels beside eager PyTorch and torch.compile, in one run.

    python plugins/robplug-flow/benchmarks/kernels.py

Forward, backward and both, on the CPU, or on the GPU where there is one. A ratio is relative to eager PyTorch, so that
below 1 is faster and above 1 a loss.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # read when torch is imported

import torch
import torch.nn.functional as F
from torch import Tensor

from robplug_flow import flow_gradient_penalty, flow_smoothness, warp

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from kernel_case import Case, Function, Shape, benchmark
from schema import Row

OURS, EAGER, COMPILED, SAMPLER = "robplug-flow", "eager PyTorch", "torch.compile", "autograd through grid_sample"
SHAPES: dict[str, tuple[Shape, ...]] = {
    "cpu": ((128, 1, 28, 28), (128, 3, 32, 32), (4, 3, 224, 224)),
    "cuda": ((128, 3, 32, 32), (64, 3, 224, 224), (4, 3, 2048, 2048)),
}


def grid_warp(x: Tensor, flow: Tensor) -> Tensor:
    """The warp as one writes it with grid_sample: flow in pixels, (row, column)."""
    height, width = x.shape[2:]
    rows_ = torch.arange(height, device=x.device, dtype=flow.dtype)[:, None] + flow[:, 0]
    cols = torch.arange(width, device=x.device, dtype=flow.dtype) + flow[:, 1]
    grid = torch.stack([cols * (2 / (width - 1)) - 1, rows_ * (2 / (height - 1)) - 1], dim=-1)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=True)


def plain_penalty(x: Tensor, g: Tensor) -> Tensor:
    """The closed form in plain PyTorch."""
    by_row = (g[:, :, :-1] * (x[:, :, 1:] - x[:, :, :-1])).sum(1)
    by_col = (g[:, :, :, :-1] * (x[:, :, :, 1:] - x[:, :, :, :-1])).sum(1)
    return by_row.square().sum((1, 2)) + by_col.square().sum((1, 2))


def sampler_penalty(x: Tensor, g: Tensor) -> Tensor:
    """The penalty without its closed form: the gradient of a sampler with respect to a zero flow, kept in the graph."""
    flow = torch.zeros(len(x), 2, *x.shape[2:], device=x.device, dtype=x.dtype, requires_grad=True)
    (slope,) = torch.autograd.grad(grid_warp(x, flow), flow, g, create_graph=True)
    return slope.square().sum((1, 2, 3))


def plain_smoothness(flow: Tensor) -> Tensor:
    """The flow loss over adjacent neighbours in plain PyTorch."""
    down, along = flow[:, :, 1:] - flow[:, :, :-1], flow[:, :, :, 1:] - flow[:, :, :, :-1]
    roots = ((change.square().sum(1) + 1e-8).sqrt().sum((1, 2)) for change in (down, along))
    return 2 * sum(roots, torch.zeros((), device=flow.device))


def cases(shape: Shape, device: str, compiled: bool) -> list[Case]:
    """Returns what is measured on images of one shape."""
    images = torch.rand(shape, device=device)
    flow = torch.rand(shape[0], 2, *shape[2:], device=device).mul_(0.8).add_(0.1)  # clear of the kinks
    upstream = torch.randn(shape, device=device)
    label = "x".join(map(str, shape))

    def beside(ours: Function, eager: Function) -> dict[str, Function]:
        extra = {COMPILED: torch.compile(eager, dynamic=False)} if compiled else {}
        return {OURS: ours, EAGER: eager, **extra}

    return [
        Case(
            f"warp {label}, flow's gradient",
            OURS,
            EAGER,
            beside(warp, grid_warp),
            (images, flow.clone().requires_grad_()),
            grid_warp,
        ),
        Case(
            f"warp {label}, both gradients",
            OURS,
            EAGER,
            beside(warp, grid_warp),
            (images.clone().requires_grad_(), flow.clone().requires_grad_()),
            grid_warp,
        ),
        Case(
            f"penalty {label}",
            OURS,
            EAGER,
            {**beside(flow_gradient_penalty, plain_penalty), SAMPLER: sampler_penalty},
            (images, upstream.clone().requires_grad_()),
            plain_penalty,
        ),
        Case(
            f"smoothness {label}",
            OURS,
            EAGER,
            beside(flow_smoothness, plain_smoothness),
            (flow.sub(0.5).requires_grad_(),),
            plain_smoothness,
        ),
    ]


def remarks(found: list[Row], _: object) -> list[str]:
    """Returns how far the sampler's gradient is from the truth, if it is."""
    wrong = max((float(row.extra["deviation"]) for row in found if row.contender == SAMPLER), default=0.0)
    if wrong <= 1e-3:
        return []
    return [f"{SAMPLER} is off by up to {wrong:.0%}: rounded grids turn forward differences into backward ones"]


if __name__ == "__main__":
    benchmark(OURS, SHAPES, cases, Path(__file__).parent, remarks)

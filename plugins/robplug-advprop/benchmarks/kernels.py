"""Time and peak memory of mixture batch norm beside what public code does, and torch.compile, in one run.

    python plugins/robplug-advprop/benchmarks/kernels.py

Forward, backward and both, on shapes of ResNet-50, half of a batch for each of two statistics; on the CPU, or on the
GPU where there is one. Public code splits the batch, calls batch norm for each part (cuDNN's or PyTorch's own on a GPU)
and joins the results. A ratio is relative to splitting, so that below 1 is faster and above 1 a loss.
"""

from __future__ import annotations

import os
import statistics
import sys
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # read when torch is imported

import torch
import torch.nn.functional as F
from torch import Tensor

from robplug_advprop import mixture_batch_norm

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from kernel_case import Case, Function, Shape, benchmark, in_float64
from schema import Row

OURS, SPLIT, COMPILED = "robplug-advprop", "split, batch_norm, cat", "torch.compile of that"
AGAIN = "split, again"
"""The same once more: how far two equal things differ."""
SHAPES: dict[str, tuple[Shape, ...]] = {
    "cpu": ((8, 64, 56), (32, 64, 56), (8, 256, 56), (16, 512, 28), (32, 1024, 14), (8, 2048, 7), (32, 2048, 7)),
    "cuda": ((256, 64, 112), (256, 256, 56), (256, 512, 28), (256, 1024, 14), (64, 2048, 7), (256, 2048, 7)),
}
"""(N, C, H = W)."""
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


def split(x: Tensor, relu: bool, running: list[Tensor], *affine: Tensor) -> Tensor:
    """What public code does."""
    means, variances, weights, biases = running[:2], running[2:], affine[:2], affine[2:]
    parts = zip(x.chunk(2), means, variances, weights, biases, strict=True)
    out = torch.cat([F.batch_norm(*part, training=True) for part in parts])
    return out.relu_() if relu else out


def ours(x: Tensor, relu: bool, running: list[Tensor], *affine: Tensor) -> Tensor:
    """The same in one pass."""
    half = len(x) // 2
    return mixture_batch_norm(x, [half, half], affine[:2], affine[2:], running[:2], running[2:], relu=relu)


def cases(shape: Shape, device: str, compiled: bool) -> list[Case]:
    """Returns what is measured on batches of one shape: both layouts, with a ReLU behind and without."""
    return [case(shape, device, compiled, layout, relu) for layout in LAYOUTS for relu in (False, True)]


def case(shape: Shape, device: str, compiled: bool, layout: str, relu: bool) -> Case:
    """Returns batch norm of a batch of two parts."""
    count, channels, side = shape
    x = torch.randn(count, channels, side, side, device=device).contiguous(memory_format=LAYOUTS[layout])
    inputs = tuple(t.requires_grad_() for t in (x, *(torch.randn(channels, device=device) for _ in range(4))))
    exact = [in_float64(tensor).detach() for tensor in inputs]
    # no gradient comes in next to the kink of the ReLU, where rounding decides
    clear = tracking(split, False, exact[0])(*exact).abs() > 1e-4
    functions = {OURS: ours, SPLIT: split, AGAIN: split} | (
        {COMPILED: torch.compile(split, dynamic=False)} if compiled else {}
    )
    return Case(
        f"{count}x{channels}x{side}x{side} {layout}{' with ReLU' if relu else ''}",
        OURS,
        SPLIT,
        {name: tracking(function, relu, x) for name, function in functions.items()},
        inputs,
        tracking(split, relu, exact[0]),
        upstream=torch.randn_like(x) * clear,
    )


def tracking(function: Function, relu: bool, like: Tensor) -> Function:
    """Returns a function of x, weights and biases, with running statistics of its own."""
    running = [like.new_full(like.shape[1:2], value) for value in (0.0, 0.0, 1.0, 1.0)]
    return lambda x, *affine: function(x, relu, running, *affine)


def remarks(found: list[Row], _: object) -> list[str]:
    """Returns what ours takes relative to splitting, for each direction and layout."""
    lines = []
    for layout in LAYOUTS:
        for direction in ("forward", "backward", "both"):
            mine = [row for row in found if row.contender == OURS and layout in row.case]
            ratios = sorted(row.ratio for row in mine if row.case.endswith(direction))
            lines.append(
                f"{layout} {direction}: {OURS} takes {statistics.median(ratios):.2f}x the time of splitting "
                f"(median over {len(ratios)} cases; {ratios[0]:.2f}x to {ratios[-1]:.2f}x)"
            )
    return lines


if __name__ == "__main__":
    benchmark(OURS, SHAPES, cases, Path(__file__).parent, remarks)

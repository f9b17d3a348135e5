"""Time and peak memory of the erosions beside eager PyTorch, torch.compile and the same traffic without erosion.

    python plugins/robplug-ghost/benchmarks/kernels.py

Forward, backward and both, on the CPU, or on the GPU where there is one. The kernels are compared with their
definition, written out with the weights and masks of the seed. Eager PyTorch and torch.compile draw their own numbers,
as one writes it, and keep what their gradients need. Every call has a seed of its own, as in an attack. A ratio is
relative to eager PyTorch, so that below 1 is faster and above 1 a loss.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # read when torch is imported

import torch
import torch.nn.functional as F
from torch import Tensor

from robplug_ghost import erode_add, erode_dropout
from robplug_ghost.kernels import reference

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from kernel_case import Case, Function, Shape, benchmark
from schema import Row, timed

OURS, EAGER, COMPILED, BARE = "robplug-ghost", "eager PyTorch", "torch.compile", "no erosion"
SHAPES: dict[str, tuple[Shape, ...]] = {
    "cpu": ((32, 16, 32, 32), (4, 256, 56, 56), (4, 2048, 7, 7)),
    "cuda": ((128, 16, 32, 32), (32, 256, 56, 56), (32, 2048, 7, 7)),
}
KINDS = {
    "cpu": ((torch.float32, "NCHW"), (torch.float32, "NHWC")),
    "cuda": ((torch.float32, "NCHW"), (torch.float32, "NHWC"), (torch.float16, "NCHW"), (torch.bfloat16, "NHWC")),
}
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
SKIP, KEEP, SEED, LAYER = 0.22, 0.994, 12345, 3
SEEDS = itertools.count(SEED)


def plain_skip(shortcut: Tensor, residual: Tensor) -> Tensor:
    """Skip erosion as one writes it."""
    w = 1 + SKIP * (2 * torch.rand(1, shortcut.shape[1], 1, 1, device=shortcut.device, dtype=shortcut.dtype) - 1)
    return F.relu(w * shortcut + residual)


def plain_dropout(x: Tensor) -> Tensor:
    """Dropout erosion as one writes it: one mask for all samples."""
    mask = torch.rand(x.shape[1:], device=x.device) < KEEP
    return x * mask / KEEP


def true_skip(shortcut: Tensor, residual: Tensor) -> Tensor:
    """Skip erosion with the weights of the seed."""
    w = reference.channel_weights(SEED, LAYER, shortcut.shape[1], SKIP).to(shortcut)
    return F.relu(w[:, None, None] * shortcut + residual)


def true_dropout(x: Tensor) -> Tensor:
    """Dropout erosion with the mask of the seed."""
    mask = reference.kept(SEED, LAYER, x.shape[1], x[0, 0].numel(), KEEP, torch.device("cpu"))
    return x * mask.view(x.shape[1:]).to(x.device) / KEEP


def cases(shape: Shape, device: str, compiled: bool) -> list[Case]:
    """Returns what is measured on tensors of one shape: both erosions, in each dtype and layout."""
    return [case for kind in KINDS[device] for case in erosions(shape, device, compiled, *kind)]


def erosions(shape: Shape, device: str, compiled: bool, dtype: torch.dtype, layout: str) -> list[Case]:
    """Returns both erosions."""
    shortcut, residual, x = (made(shape, device, dtype, layout).requires_grad_() for _ in range(3))
    label = named(shape, dtype, layout)
    same = {"tolerance": 2 * torch.finfo(dtype).eps, "bare": (BARE,)}

    def beside(ours: Function, eager: Function, bare: Function) -> dict[str, Function]:
        extra = {COMPILED: torch.compile(eager, dynamic=False)} if compiled else {}
        return {OURS: ours, EAGER: eager, **extra, BARE: bare}

    return [
        Case(
            f"erode_add with relu {label}",
            OURS,
            EAGER,
            beside(
                lambda s, r: erode_add(s, r, next(SEEDS), LAYER, SKIP, "relu"),
                plain_skip,
                lambda s, r: F.relu(s + r),
            ),
            (shortcut, residual),
            true_skip,
            seeded=lambda s, r: erode_add(s, r, SEED, LAYER, SKIP, "relu"),
            **same,
        ),
        Case(
            f"erode_dropout {label}",
            OURS,
            EAGER,
            beside(lambda x: erode_dropout(x, next(SEEDS), LAYER, KEEP), plain_dropout, lambda x: x * KEEP),
            (x,),
            true_dropout,
            seeded=lambda x: erode_dropout(x, SEED, LAYER, KEEP),
            **same,
        ),
    ]


def made(shape: Shape, device: str, dtype: torch.dtype, layout: str) -> Tensor:
    """Returns random numbers of one kind."""
    return torch.randn(shape, device=device, dtype=dtype).to(memory_format=LAYOUTS[layout])


def named(shape: Shape, dtype: torch.dtype, layout: str) -> str:
    """Returns shape, dtype and layout in words."""
    return f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')} {layout}"


def remarks(_: list[Row], options: argparse.Namespace) -> list[str]:
    """Returns the share of the GPU's memory throughput that erode_add reaches."""
    if options.device == "cpu":
        return []
    return [roofline(shape, *kind, options.repeats) for shape in SHAPES["cuda"] for kind in KINDS["cuda"]]


def roofline(shape: Shape, dtype: torch.dtype, layout: str, repeats: int) -> str:
    """Returns the share for one kind of tensor; a plain sum has the same traffic."""
    s, r = (made(shape, "cuda", dtype, layout) for _ in range(2))
    out = torch.empty_like(r)

    def many(call: Callable[[], object]) -> Callable[[], None]:
        return lambda: [call() for _ in range(50)] and None

    contenders = {
        OURS: many(lambda: erode_add(s, r, SEED, LAYER, SKIP, "relu")),
        BARE: many(lambda: torch.add(s, r, out=out)),
    }
    times = {name: statistics.median(found) / 50 for name, found in timed(contenders, repeats, warmup=3).items()}
    traffic = 3 * s.numel() * s.element_size() / 1e9
    share = times[BARE] / times[OURS]
    verdict = "WIN" if share >= 0.8 else "LOSS"
    return (
        f"erode_add {named(shape, dtype, layout)}: {traffic / times[OURS]:.0f} GB/s, "
        f"a plain sum {traffic / times[BARE]:.0f}: {share:.0%}, limit 80%: {verdict}"
    )


if __name__ == "__main__":
    benchmark(OURS, SHAPES, cases, Path(__file__).parent, remarks)

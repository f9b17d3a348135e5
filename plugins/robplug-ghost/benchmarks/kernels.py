"""Time and peak memory of the erosions beside eager PyTorch, torch.compile and the same traffic without erosion.

    python plugins/robplug-ghost/benchmarks/kernels.py

Forward, backward and both, on the CPU, or on the GPU where there is one. Before anything is timed the kernels are
compared with their definition, written out with the weights and masks of the seed, in float64; a wrong kernel prints no
time. Eager PyTorch and torch.compile draw their own numbers, as one writes it, and keep what their gradients need.
Every call has a seed of its own, as in an attack. Rounds go through all contenders in turn; a ratio is the median over
rounds of time relative to eager PyTorch, so that below 1 is faster and above 1 a loss.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "5")

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from robplug_ghost import erode_add, erode_dropout
from robplug_ghost.kernels import reference

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from schema import Result, Row, keep_heap, rows, surroundings, timed, write

OURS, EAGER, COMPILED, BARE = "robplug-ghost", "eager PyTorch", "torch.compile", "no erosion"
SHAPES = {
    "cpu": ((32, 16, 32, 32), (4, 256, 56, 56), (4, 2048, 7, 7)),
    "cuda": ((128, 16, 32, 32), (32, 256, 56, 56), (32, 2048, 7, 7)),
}
SKIP, KEEP, SEED, LAYER = 0.22, 0.994, 12345, 3
Function = Callable[..., Tensor]
SEEDS = itertools.count(SEED)


@dataclass
class Case:
    """One function on one shape.

    Attributes:
        name: of function and shape.
        contenders: implementations by name, of the inputs.
        inputs: tensors that require a gradient.
        ours: the kernel with `SEED`.
        truth: its definition.
    """

    name: str
    contenders: dict[str, Function]
    inputs: tuple[Tensor, ...]
    ours: Function
    truth: Function


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


def cases(shape: tuple[int, ...], device: str, dtype: torch.dtype, last: bool, compiled: bool) -> list[Case]:
    """Returns what is measured on tensors of one shape."""
    torch.manual_seed(0)
    torch._dynamo.reset()  # else the second shape is compiled for any shape
    layout = torch.channels_last if last else torch.contiguous_format
    make = (torch.randn(shape, device=device, dtype=dtype).to(memory_format=layout) for _ in range(3))
    shortcut, residual, x = (tensor.requires_grad_() for tensor in make)
    label = "x".join(map(str, shape))

    def beside(ours: Function, eager: Function, bare: Function) -> dict[str, Function]:
        extra = {COMPILED: torch.compile(eager, dynamic=False)} if compiled else {}
        return {OURS: ours, EAGER: eager, **extra, BARE: bare}

    return [
        Case(
            f"erode_add with relu {label}",
            beside(
                lambda s, r: erode_add(s, r, next(SEEDS), LAYER, SKIP, "relu"),
                plain_skip,
                lambda s, r: F.relu(s + r),
            ),
            (shortcut, residual),
            lambda s, r: erode_add(s, r, SEED, LAYER, SKIP, "relu"),
            true_skip,
        ),
        Case(
            f"erode_dropout {label}",
            beside(lambda x: erode_dropout(x, next(SEEDS), LAYER, KEEP), plain_dropout, lambda x: x * KEEP),
            (x,),
            lambda x: erode_dropout(x, SEED, LAYER, KEEP),
            true_dropout,
        ),
    ]


def results(function: Function, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Returns value and gradients, with the same upstream gradient for all."""
    out = function(*inputs)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]


def deviation(case: Case) -> float:
    """Returns the kernel's largest distance from its definition in float64, relative to the largest value."""
    exact = tuple(tensor.detach().double().requires_grad_() for tensor in case.inputs)
    pairs = zip(results(case.ours, case.inputs), results(case.truth, exact), strict=True)
    return max(((one - other).abs().max() / other.abs().max()).item() for one, other in pairs)


def peak_mib(run: Callable[[], object], device: str) -> float:
    """Returns the most memory that a call holds at once beyond what was held before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


def passes(case: Case) -> dict[str, dict[str, Callable[[], object]]]:
    """Returns for each direction what each contender is timed on."""
    found: dict[str, dict[str, Callable[[], object]]] = {"forward": {}, "backward": {}, "both": {}}
    for name, function in case.contenders.items():
        out = function(*case.inputs)
        upstream = torch.ones_like(out)

        def both(function: Function = function, upstream: Tensor = upstream) -> object:
            return torch.autograd.grad(function(*case.inputs), case.inputs, upstream)

        def backward(out: Tensor = out, upstream: Tensor = upstream) -> object:
            return torch.autograd.grad(out, case.inputs, upstream, retain_graph=True)

        found["forward"][name] = lambda function=function: function(*case.inputs)
        found["backward"][name] = backward
        found["both"][name] = both
    return found


def measure(case: Case, device: str, repeats: int) -> list[Row]:
    """Returns a row per direction and contender; stops where the kernels are wrong."""
    off = deviation(case)
    if not off <= 2 * torch.finfo(case.inputs[0].dtype).eps:
        sys.exit(f"{case.name}: {OURS} is off by {off:.1e}; nothing is timed")
    found = []
    for direction, runs in passes(case).items():
        memory = {name: peak_mib(run, device) for name, run in runs.items()}
        for row in rows(f"{case.name}, {direction}", timed(runs, repeats, warmup=3), EAGER, 1e3, "ms"):
            row.extra = {"peak_mib": round(memory[row.contender], 3)}
            found.append(row)
    return found


def findings(found: list[Row]) -> list[str]:
    """Returns the losses first, then a summary of each contender against ours, and the share of the plain traffic."""
    ours = {row.case: row for row in found if row.contender == OURS}
    lines = [
        f"LOSS {row.case}: {OURS} takes {ours[row.case].median:.3f} ms, {row.contender} {row.median:.3f} ms"
        for row in found
        if row.contender in (EAGER, COMPILED) and row.median < ours[row.case].median
    ]
    for name in dict.fromkeys(row.contender for row in found if row.contender != OURS):
        speed = [row.median / ours[row.case].median for row in found if row.contender == name]
        lines.append(f"{name} takes {statistics.median(speed):.2f}x the time of {OURS} (median over {len(speed)} rows)")
    return lines


def roofline(shape: tuple[int, ...], dtype: torch.dtype, last: bool, repeats: int) -> str:
    """Returns the share of the GPU's memory throughput that erode_add reaches; a plain sum has the same traffic."""
    layout = torch.channels_last if last else torch.contiguous_format
    s, r = (torch.randn(shape, device="cuda", dtype=dtype).to(memory_format=layout) for _ in range(2))
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
    label = "x".join(map(str, shape))
    return (
        f"erode_add {label}: {traffic / times[OURS]:.0f} GB/s, a plain sum {traffic / times[BARE]:.0f}: "
        f"{share:.0%}, limit 80%: {verdict}"
    )


def main() -> None:
    """Runs all cases and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=device)
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out; it needs a C++ compiler")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kernels.json")
    options = parser.parse_args()
    heap, dtype = keep_heap(), getattr(torch, options.dtype)
    # a compiled backward that frees its buffers cannot be timed apart from its forward
    torch._functorch.config.donated_buffer = False
    found, shares = [], []
    for shape in SHAPES[options.device]:
        for case in cases(shape, options.device, dtype, options.channels_last, not options.no_compile):
            found += measure(case, options.device, options.repeats)
        if options.device == "cuda":
            shares.append(roofline(shape, dtype, options.channels_last, options.repeats))
    layout = "NHWC" if options.channels_last else "NCHW"
    result = Result(
        benchmark="robplug-ghost kernels",
        command=f"python plugins/robplug-ghost/benchmarks/kernels.py --repeats {options.repeats}",
        settings={
            "device": options.device,
            "repeats": options.repeats,
            "dtype": options.dtype,
            "layout": layout,
            "heap": heap,
        },
        rows=found,
        findings=[*findings(found), *shares],
        **surroundings(),
    )
    write(result, options.out)


if __name__ == "__main__":
    main()

"""Time and peak memory of mixture batch norm beside what public code does, and torch.compile, in one run.

    python plugins/robplug-advprop/benchmarks/kernels.py

Forward, backward and both, on shapes of ResNet-50, half of a batch for each of two statistics; on the CPU, or on the
GPU where there is one. Public code splits the batch, calls batch norm for each part (cuDNN's or PyTorch's own on a GPU)
and joins the results. Every contender's results are compared before anything is timed; a wrong kernel prints no time.
Rounds go through all contenders in turn; a ratio is the median over rounds of time relative to splitting, so that
below 1 is faster and above 1 a loss.
"""

from __future__ import annotations

import argparse
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

from robplug_advprop import mixture_batch_norm

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from schema import Result, Row, keep_heap, rows, surroundings, timed, write

OURS, SPLIT, COMPILED = "robplug-advprop", "split, batch_norm, cat", "torch.compile of that"
SHAPES = {
    "cpu": ((8, 64, 56), (32, 64, 56), (8, 256, 56), (16, 512, 28), (32, 1024, 14), (8, 2048, 7), (32, 2048, 7)),
    "cuda": ((256, 64, 112), (256, 256, 56), (256, 512, 28), (256, 1024, 14), (64, 2048, 7), (256, 2048, 7)),
}
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
Function = Callable[..., Tensor]


@dataclass
class Case:
    """Batch norm of a batch of two parts.

    Attributes:
        name: shape, layout and what follows.
        contenders: functions of x and of weight and bias of each part; `OURS` and `SPLIT` among them.
        inputs: what they are given; each gets a gradient.
        relu: whether a ReLU follows.
    """

    name: str
    contenders: dict[str, Function]
    inputs: list[Tensor]
    relu: bool


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


def cases(shape: tuple[int, int, int], layout: str, device: str, compiled: bool) -> list[Case]:
    """Returns what is measured on batches of one shape, (N, C, H = W)."""
    torch.manual_seed(0)
    torch._dynamo.reset()  # else the second shape is compiled for any shape
    count, channels, side = shape
    x = torch.randn(count, channels, side, side, device=device).contiguous(memory_format=LAYOUTS[layout])
    affine = [torch.randn(channels, device=device).requires_grad_() for _ in range(4)]
    functions = {OURS: ours, SPLIT: split} | ({COMPILED: torch.compile(split, dynamic=False)} if compiled else {})
    label = f"{count}x{channels}x{side}x{side} {layout}"
    found = []
    for relu in (False, True):
        contenders: dict[str, Function] = {}
        for name, function in functions.items():
            running = [torch.full((channels,), float(k), device=device) for k in (0, 0, 1, 1)]
            contenders[name] = lambda x, *affine, f=function, r=running, relu=relu: f(x, relu, r, *affine)
        inputs = [x.clone().requires_grad_(), *affine]
        found.append(Case(f"{label}{' with ReLU' if relu else ''}", contenders, inputs, relu))
    return found


def results(function: Function, inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """Returns value and gradients of one contender."""
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream.to(out))]


def deviations(case: Case) -> dict[str, float]:
    """Returns each contender's largest distance from the float64 truth, relative to the truth's largest value."""
    exact = [tensor.detach().double().requires_grad_() for tensor in case.inputs]
    running = [tensor.detach().clone() for tensor in exact[1:]]
    # no gradient comes in next to the kink of the ReLU, where rounding decides
    clear = split(exact[0], False, running, *exact[1:]).detach().abs() > 1e-4
    upstream = torch.randn_like(exact[0]) * clear
    truth = results(lambda x, *affine: split(x, case.relu, running, *affine), exact, upstream)
    found = {}
    for name, function in case.contenders.items():
        pairs = zip(results(function, case.inputs, upstream), truth, strict=True)
        found[name] = max(((one - other).abs().max() / other.abs().max()).item() for one, other in pairs)
    return found


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


def forward(case: Case) -> dict[str, Callable[[], object]]:
    return {name: lambda f=function: f(*case.inputs) for name, function in case.contenders.items()}


def backward(case: Case) -> dict[str, Callable[[], object]]:
    found: dict[str, Callable[[], object]] = {}
    for name, function in case.contenders.items():
        out = function(*case.inputs)
        upstream = torch.randn_like(out)
        found[name] = lambda out=out, g=upstream: torch.autograd.grad(out, case.inputs, g, retain_graph=True)
    return found


def both(case: Case) -> dict[str, Callable[[], object]]:
    upstream = torch.randn_like(case.inputs[0])
    return {
        name: lambda f=function: torch.autograd.grad(f(*case.inputs), case.inputs, upstream)
        for name, function in case.contenders.items()
    }


def measure(case: Case, device: str, repeats: int) -> list[Row]:
    """Returns a row per direction and contender; stops where the kernels are wrong."""
    off = deviations(case)
    if not off[OURS] <= max(1e-5, 2 * off[SPLIT]):
        sys.exit(f"{case.name}: {OURS} is off by {off[OURS]:.1e}, {SPLIT} by {off[SPLIT]:.1e}; nothing is timed")
    found = []
    for direction in (forward, backward, both):
        runs = direction(case)
        memory = {name: peak_mib(run, device) for name, run in runs.items()}
        for row in rows(f"{case.name}, {direction.__name__}", timed(runs, repeats, warmup=3), SPLIT, 1e3, "ms"):
            row.extra = {"peak_mib": round(memory[row.contender], 3), "deviation": float(f"{off[row.contender]:.1e}")}
            found.append(row)
    return found


def findings(found: list[Row]) -> list[str]:
    """Returns the losses first, then what ours takes relative to splitting, for each direction and layout."""
    ours_ = {row.case: row for row in found if row.contender == OURS}
    lines = [
        f"LOSS {row.case}: {OURS} takes {ours_[row.case].median:.3f} ms, {row.contender} {row.median:.3f} ms"
        for row in found
        if row.contender != OURS and row.median < ours_[row.case].median
    ]
    for layout in LAYOUTS:
        for direction in (forward, backward, both):
            mine = [row for case, row in ours_.items() if layout in case and case.endswith(direction.__name__)]
            ratios = sorted(row.ratio for row in mine)
            lines.append(
                f"{layout} {direction.__name__}: {OURS} takes {statistics.median(ratios):.2f}x the time of splitting "
                f"(median over {len(ratios)} cases; {ratios[0]:.2f}x to {ratios[-1]:.2f}x)"
            )
    return lines


def main() -> None:
    """Runs all cases and writes the results."""
    heap = keep_heap()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=device)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out; it needs a C++ compiler")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kernels.json")
    options = parser.parse_args()
    # a compiled backward that frees its buffers cannot be timed apart from its forward
    torch._functorch.config.donated_buffer = False
    found = []
    for shape in SHAPES[options.device]:
        for layout in LAYOUTS:
            for case in cases(shape, layout, options.device, not options.no_compile):
                found += measure(case, options.device, options.repeats)
    result = Result(
        benchmark="robplug-advprop kernels",
        command=f"python plugins/robplug-advprop/benchmarks/kernels.py --repeats {options.repeats}",
        settings={"device": options.device, "repeats": options.repeats, "dtype": "float32", "heap": heap},
        rows=found,
        findings=findings(found),
        **surroundings(),
    )
    write(result, options.out)


if __name__ == "__main__":
    sys.exit(main())

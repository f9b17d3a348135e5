"""Time and peak memory of the kernels beside eager PyTorch and torch.compile, in one run.

    python plugins/robplug-flow/benchmarks/kernels.py

Forward, backward and both, on the CPU, or on the GPU where there is one. Every contender's results are compared before
anything is timed; a wrong kernel prints no time. Rounds go through all contenders in turn; a ratio is the median over
rounds of time relative to eager PyTorch, so that below 1 is faster and above 1 a loss.
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

from robplug_flow import flow_gradient_penalty, flow_smoothness, warp

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from schema import Result, Row, rows, surroundings, timed, write

OURS, EAGER, COMPILED, SAMPLER = "robplug-flow", "eager PyTorch", "torch.compile", "autograd through grid_sample"
SHAPES = {
    "cpu": ((128, 1, 28, 28), (128, 3, 32, 32), (4, 3, 224, 224)),
    "cuda": ((128, 3, 32, 32), (64, 3, 224, 224), (4, 3, 2048, 2048)),
}
Function = Callable[..., Tensor]


@dataclass
class Case:
    """One function on one shape.

    Attributes:
        name: of function and shape.
        contenders: implementations; `OURS` and `EAGER` among them.
        inputs: tensors; those that require a gradient get one.
        truth: what is run in float64 on the same inputs.
    """

    name: str
    contenders: dict[str, Function]
    inputs: tuple[Tensor, ...]
    truth: Function

    def leaves(self) -> list[Tensor]:
        return [tensor for tensor in self.inputs if tensor.requires_grad]


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


def cases(shape: tuple[int, ...], device: str, compiled: bool) -> list[Case]:
    """Returns what is measured on images of one shape."""
    torch.manual_seed(0)
    torch._dynamo.reset()  # else the second shape is compiled for any shape
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
            beside(warp, grid_warp),
            (images, flow.clone().requires_grad_()),
            grid_warp,
        ),
        Case(
            f"warp {label}, both gradients",
            beside(warp, grid_warp),
            (images.clone().requires_grad_(), flow.clone().requires_grad_()),
            grid_warp,
        ),
        Case(
            f"penalty {label}",
            {**beside(flow_gradient_penalty, plain_penalty), SAMPLER: sampler_penalty},
            (images, upstream.clone().requires_grad_()),
            plain_penalty,
        ),
        Case(
            f"smoothness {label}",
            beside(flow_smoothness, plain_smoothness),
            (flow.sub(0.5).requires_grad_(),),
            plain_smoothness,
        ),
    ]


def results(function: Function, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Returns value and gradients of one contender, with the same upstream gradient for all."""
    leaves = [tensor for tensor in inputs if tensor.requires_grad]
    out = function(*inputs)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(out.shape, generator=generator).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def deviations(case: Case) -> dict[str, float]:
    """Returns each contender's largest distance from the float64 truth, relative to the truth's largest value."""
    exact = tuple(tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in case.inputs)
    truth = results(case.truth, exact)
    found = {}
    for name, function in case.contenders.items():
        pairs = zip(results(function, case.inputs), truth, strict=True)
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


def passes(case: Case) -> dict[str, dict[str, Callable[[], object]]]:
    """Returns for each direction what each contender is timed on."""
    found: dict[str, dict[str, Callable[[], object]]] = {"forward": {}, "backward": {}, "both": {}}
    for name, function in case.contenders.items():
        out = function(*case.inputs)
        upstream = torch.ones_like(out)

        def both(function: Function = function, upstream: Tensor = upstream) -> object:
            return torch.autograd.grad(function(*case.inputs), case.leaves(), upstream)

        def backward(out: Tensor = out, upstream: Tensor = upstream) -> object:
            return torch.autograd.grad(out, case.leaves(), upstream, retain_graph=True)

        found["forward"][name] = lambda function=function: function(*case.inputs)
        found["backward"][name] = backward
        found["both"][name] = both
    return found


def measure(case: Case, device: str, repeats: int) -> list[Row]:
    """Returns a row per direction and contender; stops where the kernels are wrong."""
    off = deviations(case)
    if not off[OURS] <= max(1e-5, 2 * off[EAGER]):
        sys.exit(f"{case.name}: {OURS} is off by {off[OURS]:.1e}, {EAGER} by {off[EAGER]:.1e}; nothing is timed")
    found = []
    for direction, runs in passes(case).items():
        memory = {name: peak_mib(run, device) for name, run in runs.items()}
        for row in rows(f"{case.name}, {direction}", timed(runs, repeats, warmup=3), EAGER, 1e3, "ms"):
            row.extra = {"peak_mib": round(memory[row.contender], 3), "deviation": float(f"{off[row.contender]:.1e}")}
            found.append(row)
    return found


def findings(found: list[Row]) -> list[str]:
    """Returns the losses first, then a summary of each contender against ours."""
    ours = {row.case: row for row in found if row.contender == OURS}
    lines = [
        f"LOSS {row.case}: {OURS} takes {ours[row.case].median:.3f} ms, {row.contender} {row.median:.3f} ms"
        for row in found
        if row.contender != OURS and row.median < ours[row.case].median
    ]
    for name in dict.fromkeys(row.contender for row in found if row.contender != OURS):
        speed = [row.median / ours[row.case].median for row in found if row.contender == name]
        lines.append(f"{name} takes {statistics.median(speed):.2f}x the time of {OURS} (median over {len(speed)} rows)")
    wrong = max((float(row.extra["deviation"]) for row in found if row.contender == SAMPLER), default=0.0)
    if wrong > 1e-3:
        lines.append(
            f"{SAMPLER} is off by up to {wrong:.0%}: rounded grids turn forward differences into backward ones"
        )
    return lines


def main() -> None:
    """Runs all cases and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=device)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out; it needs a C++ compiler")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kernels.json")
    options = parser.parse_args()
    # a compiled backward that frees its buffers cannot be timed apart from its forward
    torch._functorch.config.donated_buffer = False
    found = []
    for shape in SHAPES[options.device]:
        for case in cases(shape, options.device, not options.no_compile):
            found += measure(case, options.device, options.repeats)
    result = Result(
        benchmark="robplug-flow kernels",
        command=f"python plugins/robplug-flow/benchmarks/kernels.py --repeats {options.repeats}",
        settings={"device": options.device, "repeats": options.repeats, "dtype": "float32", "layout": "NCHW"},
        rows=found,
        findings=findings(found),
        **surroundings(),
    )
    write(result, options.out)


if __name__ == "__main__":
    sys.exit(main())

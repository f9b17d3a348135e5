"""What the kernels' benchmarks share: time, peak memory and exactness of one function in several implementations.

Every contender's results are compared before anything is timed; a wrong kernel prints no time. Rounds go through all
contenders in turn; a ratio is the median over rounds of time relative to the case's yardstick.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._functorch.config
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from schema import Result, Row, keep_heap, rows, surroundings, timed, write

Function = Callable[..., Tensor]
Shape = tuple[int, ...]


@dataclass
class Case:
    """One function on one shape.

    Attributes:
        name: of function and shape.
        ours: whose kernel is judged.
        yardstick: the contender that counts as 1.
        contenders: implementations, these two among them.
        inputs: tensors; those that require a gradient get one.
        truth: what is run in float64 on the same inputs.
        upstream: the gradient that comes in where results are compared; None draws one.
        seeded: ours with the random numbers of the truth, where contenders draw their own; then it alone is compared.
        tolerance: relative deviation that ours may have; twice that of the yardstick is always allowed.
        bare: contenders that do less than is asked for, so that a faster one is no loss.
    """

    name: str
    ours: str
    yardstick: str
    contenders: dict[str, Function]
    inputs: tuple[Tensor, ...]
    truth: Function
    upstream: Tensor | None = None
    seeded: Function | None = None
    tolerance: float = 1e-5
    bare: tuple[str, ...] = ()

    def leaves(self) -> list[Tensor]:
        return [tensor for tensor in self.inputs if tensor.requires_grad]


def benchmark(
    plugin: str,
    shapes: Mapping[str, tuple[Shape, ...]],
    cases: Callable[[Shape, str, bool], list[Case]],
    home: Path,
    remarks: Callable[[list[Row], argparse.Namespace], list[str]] = lambda found, options: [],
) -> None:
    """Runs all cases, as the command line wants it, and writes the results.

    Args:
        plugin: name of the distribution.
        shapes: per kind of device.
        cases: of a shape, a device and whether torch.compile takes part.
        home: folder of the benchmark.
        remarks: further findings, of the rows and the options ``device`` and ``repeats``.
    """
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=device)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out; it needs a C++ compiler")
    parser.add_argument("--out", type=Path, default=home / "results" / "kernels.json")
    options = parser.parse_args()
    # a compiled backward that frees its buffers cannot be timed apart from its forward
    torch._functorch.config.donated_buffer = False
    heap = keep_heap()
    found: list[Row] = []
    losses: list[str] = []
    for shape in shapes[options.device]:
        torch.manual_seed(0)
        torch._dynamo.reset()  # else the second shape is compiled for any shape
        for case in cases(shape, options.device, not options.no_compile):
            measured = measure(case, options.device, options.repeats)
            losses += lost(case, measured)
            found += measured
    default = {"dtype": "float32", "layout": "NCHW"}  # where a case does not name others
    settings = {"device": options.device, "repeats": options.repeats, **default}
    result = Result(
        benchmark=f"{plugin} kernels",
        command=f"python plugins/{plugin}/benchmarks/kernels.py --repeats {options.repeats}",
        settings={**settings, "heap": heap},
        rows=found,
        findings=[*losses, *summary(plugin, found), *remarks(found, options)],
        **surroundings(),
    )
    write(result, options.out)


def results(function: Function, inputs: tuple[Tensor, ...], upstream: Tensor | None) -> list[Tensor]:
    """Returns value and gradients of one contender, with the same upstream gradient for all."""
    leaves = [tensor for tensor in inputs if tensor.requires_grad]
    out = function(*inputs)
    if upstream is None:
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out))]


def in_float64(tensor: Tensor) -> Tensor:
    """Returns the tensor in float64, and whole numbers as they are."""
    return tensor.detach().double().requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else tensor


def deviations(case: Case) -> dict[str, float]:
    """Returns each contender's largest distance from the float64 truth, relative to the truth's largest value."""
    truth = results(case.truth, tuple(map(in_float64, case.inputs)), case.upstream)
    compared = case.contenders if case.seeded is None else {case.ours: case.seeded}
    found = {}
    for name, function in compared.items():
        pairs = zip(results(function, case.inputs, case.upstream), truth, strict=True)
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
    allowed = max(case.tolerance, 2 * off.get(case.yardstick, 0.0))
    if not off[case.ours] <= allowed:
        sys.exit(f"{case.name}: {case.ours} is off by {off[case.ours]:.1e}, allowed {allowed:.1e}; nothing is timed")
    found = []
    for direction, runs in passes(case).items():
        memory = {name: peak_mib(run, device) for name, run in runs.items()}
        times = timed(runs, repeats, warmup=3)
        for row in rows(f"{case.name}, {direction}", times, case.yardstick, 1e3, "ms"):
            row.extra = {"peak_mib": round(memory[row.contender], 3)}
            if row.contender in off:
                row.extra["deviation"] = float(f"{off[row.contender]:.1e}")
            found.append(row)
    return found


def lost(case: Case, found: list[Row]) -> list[str]:
    """Returns a line for each row in which another contender is faster than ours."""
    ours = {row.case: row.median for row in found if row.contender == case.ours}
    return [
        f"LOSS {row.case}: {case.ours} takes {ours[row.case]:.3f} ms, {row.contender} {row.median:.3f} ms"
        for row in found
        if row.contender not in (case.ours, *case.bare) and row.median < ours[row.case]
    ]


def summary(ours: str, found: list[Row]) -> list[str]:
    """Returns a line per other contender."""
    own = {row.case: row.median for row in found if row.contender == ours}
    lines = []
    for name in dict.fromkeys(row.contender for row in found if row.contender != ours):
        speed = [row.median / own[row.case] for row in found if row.contender == name]
        lines.append(f"{name} takes {statistics.median(speed):.2f}x the time of {ours} (median over {len(speed)} rows)")
    return lines

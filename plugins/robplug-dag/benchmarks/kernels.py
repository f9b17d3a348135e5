"""Time and peak memory of the kernels beside eager PyTorch and torch.compile, in one run.

    python plugins/robplug-dag/benchmarks/kernels.py

On the CPU, or on the GPU where there is one. The results of all contenders are compared before anything is timed; a
wrong one prints no time. A ratio is relative to eager PyTorch, so that below 1 is faster and above 1 a loss.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # read when torch is imported

import torch
from torch import Tensor

from robplug_dag import dense_adversary_grad, normalised_step

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from kernel_case import peak_mib
from schema import Result, Row, keep_heap, rows, surroundings, timed, write

OURS, EAGER, COMPILED, AUTOGRAD = "robplug-dag", "eager PyTorch", "torch.compile", "autograd of the sum"
Results = tuple[Tensor, ...]
Contenders = dict[str, Callable[[], Results]]
PIXELS, PROPOSALS, IMAGES = (21, 512, 512), (1000, 91), (3, 512, 512)
BATCHES = {"cpu": (1, 4), "cuda": (1, 16)}
GAMMA = 0.5 / 255


def eager_gradient(logits: Tensor, labels: Tensor, goals: Tensor) -> Results:
    """The gradient as one writes it: argmax, mask, scatter."""
    axis = 1 if logits.dim() == 4 else 2
    active = logits.argmax(axis) == labels
    signs = active.to(logits.dtype).unsqueeze(axis)
    out = torch.zeros_like(logits)
    out.scatter_add_(axis, goals.unsqueeze(axis), signs).scatter_add_(axis, labels.unsqueeze(axis), -signs)
    return out, active.flatten(1).sum(1)


def autograd_gradient(logits: Tensor, labels: Tensor, goals: Tensor) -> Results:
    """The gradient of equation 2.1's sum over active targets, by autograd."""
    axis = 1 if logits.dim() == 4 else 2
    leaf = logits.detach().requires_grad_()
    active = leaf.argmax(axis) == labels
    chosen = leaf.gather(axis, goals.unsqueeze(axis)) - leaf.gather(axis, labels.unsqueeze(axis))
    return *torch.autograd.grad((chosen.squeeze(axis) * active).sum(), leaf), active.flatten(1).sum(1)


def eager_step(gradient: Tensor, r: Tensor, x: Tensor) -> Results:
    """The step as one writes it."""
    size = gradient.flatten(1).abs().amax(1)
    r = r + GAMMA * gradient / size.clamp_min(1e-30)[:, None, None, None]
    return r, (x + r).clamp(0, 1), size


def gradients(shape: tuple[int, ...], device: str, compiled: bool) -> Contenders:
    """Returns who computes the dense gradient; a half of the targets is active."""
    logits = torch.randn(shape, device=device)
    axis = 1 if logits.dim() == 4 else 2
    best = logits.argmax(axis)
    labels = torch.where(torch.rand(best.shape, device=device) < 0.5, best, (best + 1) % shape[axis])
    goals = (labels + 2) % shape[axis]
    given = (logits, labels, goals)
    return contenders(dense_adversary_grad, eager_gradient, compiled, given) | {
        AUTOGRAD: lambda: autograd_gradient(*given)
    }


def steps(shape: tuple[int, ...], device: str, compiled: bool) -> Contenders:
    """Returns who makes the step."""
    gradient, r, x = (torch.rand(shape, device=device) for _ in range(3))
    given = (gradient, r.mul_(0.05), x)
    return contenders(lambda *tensors: normalised_step(*tensors, GAMMA, 0.0, 1.0), eager_step, compiled, given)


def contenders(
    ours: Callable[..., Results], eager: Callable[..., Results], compiled: bool, given: tuple[Tensor, ...]
) -> Contenders:
    """Returns the three that every case has, on the same tensors."""
    found: dict[str, Callable[..., Results]] = {OURS: ours, EAGER: eager}
    if compiled:
        found[COMPILED] = torch.compile(eager, dynamic=False)
    return {name: lambda call=call: call(*given) for name, call in found.items()}


def measure(case: str, runs: Contenders, device: str, repeats: int) -> list[Row]:
    """Returns a row for each contender; stops where they differ."""
    truth = runs[EAGER]()
    for name, run in runs.items():
        for one, other in zip(run(), truth, strict=True):
            if not torch.allclose(one.double(), other.double(), rtol=1e-6, atol=1e-7):
                sys.exit(f"{case}: {name} differs from {EAGER}; nothing is timed")
    memory = {name: peak_mib(run, device) for name, run in runs.items()}
    found = rows(case, timed(runs, repeats, warmup=3), EAGER, 1e3, "ms")
    for row in found:
        row.extra = {"peak_mib": round(memory[row.contender], 3)}
    return found


def findings(found: list[Row]) -> list[str]:
    """Returns a line for each contender that is faster than ours, or takes less memory."""
    ours = {row.case: row for row in found if row.contender == OURS}
    said = []
    for row in found:
        own = ours[row.case]
        if row.median < own.median:
            said.append(f"LOSS {row.case}: {OURS} takes {own.median:.3f} ms, {row.contender} {row.median:.3f} ms")
        if float(row.extra["peak_mib"]) < 0.99 * float(own.extra["peak_mib"]):
            sizes = f"{own.extra['peak_mib']} MiB, {row.contender} {row.extra['peak_mib']} MiB"
            said.append(f"LOSS {row.case}: {OURS} holds {sizes}")
    return said or [f"{OURS} is the fastest and smallest in every case"]


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=device)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out; it needs a C++ compiler")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kernels.json")
    options = parser.parse_args()
    heap = keep_heap()
    found: list[Row] = []
    for batch in BATCHES[options.device]:
        for name, makers, shape in (
            ("dense_adversary_grad", gradients, PIXELS),
            ("dense_adversary_grad", gradients, PROPOSALS),
            ("normalised_step", steps, IMAGES),
        ):
            torch.manual_seed(0)
            torch._dynamo.reset()  # else the second shape is compiled for any shape
            runs = makers((batch, *shape), options.device, not options.no_compile)
            case = f"{name} {'x'.join(map(str, (batch, *shape)))}"
            found += measure(case, runs, options.device, options.repeats)
    result = Result(
        benchmark="robplug-dag kernels",
        command=f"python plugins/robplug-dag/benchmarks/kernels.py --repeats {options.repeats}",
        settings={"device": options.device, "repeats": options.repeats, "dtype": "float32", "heap": heap},
        rows=found,
        findings=findings(found),
        **surroundings(),
    )
    write(result, options.out)


if __name__ == "__main__":
    main()

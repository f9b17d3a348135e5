"""Cost of a training step with NsLoss, in time and memory.

    python plugins/robplug-nsloss/benchmarks/step_cost.py

A step of ResNet-20 on CIFAR shapes with N noisy copies, beside N + 1 plain steps, which make as many forward and
backward passes, and beside NsLoss as one would type it: all passes in one graph. Batch norm is frozen, as the defence
has it by default; in the noisy passes its backward pass is cheaper than in plain ones. On the CPU the step is made
without the kernels, too. Before anything is timed the gradients are compared in float64. Rounds go through all
contenders in turn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

from robplug.defenses import Defense, Stack
from robplug.rng import Rng
from robplug.step import Step
from robplug.zoo import resnet20
from robplug_nsloss import comparison
from robplug_nsloss.activations import recording
from robplug_nsloss.defense import NOISE, NsLoss
from robplug_nsloss.kernels import batch_norm, calls
from robplug_nsloss.kernels.ops import mean_abs_difference
from robplug_nsloss.noise import Noise

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from kernel_case import peak_mib
from schema import Result, Row, keep_heap, rows, surroundings, timed, write

PLAIN, EQUAL, TYPED = "plain step", "N + 1 plain steps", "one graph of all passes"
OURS, WITHOUT = "nsloss/nsloss", "nsloss/nsloss, no kernels"
TIMES = {OURS: 1.1, WITHOUT: 1.2}  # N + 1 plain steps
MEMORY = 2.3  # plain steps
EXACT = 1e-12


@dataclass(frozen=True)
class Plain(Defense):
    """Plain training with batch norm frozen."""

    def mode(self, model: nn.Module) -> None:
        NsLoss().mode(model)


@dataclass(frozen=True)
class Typed(Plain):
    """NsLoss from its formula."""

    strength: float = 2.0
    draws: int = 5

    def penalty(self, step: Step) -> Tensor:
        with recording(step.model) as clean:
            step.model(step.x)
        seed = step.rng.at_restart(NOISE).batch_seed()
        noise = Noise(1.0, self.draws, generator=torch.Generator(step.x.device).manual_seed(seed))
        total = torch.zeros((), dtype=step.x.dtype, device=step.x.device)
        for copy in noise.copies(step.x):
            with recording(step.model) as noisy:
                step.model(copy)
            total = total + mean_abs_difference(clean.tensors, noisy.tensors)
        return self.strength * total / self.draws


class Contender:
    """A network in training; a call makes some steps."""

    def __init__(self, defense: Defense, x: Tensor, y: Tensor, steps: int = 1) -> None:
        torch.manual_seed(0)
        self.model = resnet20().to(x)
        self.stack = Stack([defense])
        self.stack.prepare(self.model)
        self.stack.train_mode()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4)
        self.x, self.y, self.steps = x, y, steps

    def __call__(self) -> None:
        for _ in range(self.steps):
            self.stack.train_batch(Step(self.model, self.x, self.y, Rng(0, range(len(self.x)))), self.optimizer)

    def gradients(self) -> list[Tensor]:
        """Returns those of the loss of one step."""
        losses = self.stack.losses(Step(self.model, self.x, self.y, Rng(0, range(len(self.x)))))
        return list(torch.autograd.grad(losses.total, list(self.model.parameters())))


class WithoutKernels(Contender):
    """The same in plain PyTorch, as it is made where no kernel serves."""

    def __call__(self) -> None:
        with ExitStack() as stack:
            for place, name in ((comparison, "is_native"), (calls, "is_native"), (batch_norm, "is_native_norm")):
                stack.enter_context(patch.object(place, name, lambda *_: False))
            super().__call__()


def check_exact(draws: int) -> float:
    """Returns the largest relative deviation of the gradient in float64; stops where it is too large."""
    torch.manual_seed(0)
    x, y = torch.rand(4, 3, 32, 32, dtype=torch.float64), torch.arange(4)
    ours, typed = (Contender(defense, x, y).gradients() for defense in (NsLoss(draws=draws), Typed(draws=draws)))
    off = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, typed, strict=True))
    if off > EXACT:
        sys.exit(f"the gradient is off by {off:.1e}, allowed {EXACT:.0e}; nothing is timed")
    return off


def measure(options: argparse.Namespace) -> list[Row]:
    """Returns a row for each contender."""
    torch.manual_seed(0)
    x = torch.rand(options.batch, 3, 32, 32).to(options.device)
    y = torch.randint(10, (options.batch,)).to(options.device)
    contenders: dict[str, Callable[[], None]] = {
        PLAIN: Contender(Plain(), x, y),
        EQUAL: Contender(Plain(), x, y, steps=options.draws + 1),
        OURS: Contender(NsLoss(draws=options.draws), x, y),
        TYPED: Contender(Typed(draws=options.draws), x, y),
    }
    if options.device == "cpu":
        contenders[WITHOUT] = WithoutKernels(NsLoss(draws=options.draws), x, y)
    times = timed(contenders, options.repeats, warmup=1)
    found = rows(f"ResNet-20, batch {options.batch}, N = {options.draws}", times, EQUAL, scale=1000, unit="ms")
    memory = {name: peak_mib(run, options.device) for name, run in contenders.items()}
    for row in found:
        share = memory[row.contender] / memory[PLAIN]
        row.extra = {"peak_mib": round(memory[row.contender], 1), "plain_steps_of_memory": round(share, 3)}
    return found


def findings(found: list[Row], off: float) -> list[str]:
    """Returns how the defence stands to its limits."""
    said = [f"gradient in float64: off by {off:.1e}, limit {EXACT:.0e}: WIN"]
    for row in found:
        if row.contender in TIMES:
            memory, limit = float(row.extra["plain_steps_of_memory"]), TIMES[row.contender]
            said.append(_finding(row.contender, row.ratio, "the time of N + 1 plain steps", limit))
            said.append(_finding(row.contender, memory, "a plain step's memory", MEMORY))
    return said


def _finding(name: str, value: float, of: str, limit: float) -> str:
    return f"{name}: x{value:.3f} {of}, limit {limit}: {'WIN' if value <= limit else 'LOSS'}"


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "step_cost.json")
    options = parser.parse_args()
    heap = keep_heap()
    off = check_exact(options.draws)
    found = measure(options)
    names = ("repeats", "batch", "draws", "device")
    result = Result(
        benchmark="step_cost",
        command="python plugins/robplug-nsloss/benchmarks/step_cost.py",
        settings={**{name: getattr(options, name) for name in names}, "heap": heap},
        rows=found,
        findings=findings(found, off),
        **surroundings(),
    )
    write(result, options.out)


if __name__ == "__main__":
    main()

"""Cost of a training step with the flow gradient penalty, and how near the differenced gradient is to the exact one.

    python plugins/robplug-flow/benchmarks/step_cost.py

A step of ResNet-18 on CIFAR shapes, beside a plain step in the same run: the exact penalty, autograd through
grid_sample in place of the closed form, the differenced gradient, and two plain passes, the least that it could cost.
Rounds go through all contenders in turn. Then, on the same network with SiLU and with ReLU, in train mode and
float32, untrained and after a few steps of training, and on the shipped digits network, the cosine between both
gradients over rho.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robplug
from robplug.defenses import Defense, Stack
from robplug.rng import Rng
from robplug.step import Step
from robplug.zoo_cifar import ResNet18
from robplug_flow.defense import FlowGradientRegularization

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from schema import Result, Row, keep_heap, rows, surroundings, timed, write

PLAIN, TWICE, EXACT = "plain step", "two plain passes", "flow/fgr, exact"
SAMPLER, DIFFERENCE = "autograd through grid_sample", "flow/fgr, difference"
RHOS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
LIMITS = {EXACT: 3.1, DIFFERENCE: 2.3}


@dataclass(frozen=True)
class Sampler(Defense):
    """Loss and penalty of one pass through grid_sample at no flow, whose gradient is kept in the graph."""

    strength: float = 400 / 128**2

    def objective(self, step: Step) -> Tensor:
        axes = [torch.linspace(-1, 1, size, device=step.x.device) for size in step.x.shape[2:]]
        down, right = torch.meshgrid(*axes, indexing="ij")
        grid = torch.stack([right, down], dim=-1).repeat(len(step.x), 1, 1, 1).requires_grad_()
        moved = F.grid_sample(step.x, grid, padding_mode="border", align_corners=True)
        loss = step.loss_of(step.model(moved), step.y)
        (slope,) = torch.autograd.grad(loss.sum(), grid, create_graph=True)
        return loss.mean() + self.strength * slope.square().sum() / len(step.x)


@dataclass(frozen=True)
class Twice(Defense):
    """One more plain pass."""

    def penalty(self, step: Step) -> Tensor:
        return step.loss_of(step.model(step.x + 1e-3), step.y).mean()


def a_batch(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns smooth random images, (N, 3, 32, 32), and labels."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 9, 9, generator=generator)
    fine = F.interpolate(coarse, size=(32, 32), mode="bilinear", align_corners=True)
    noise = 0.05 * torch.rand(count, 3, 32, 32, generator=generator)
    return (fine + noise).clamp(0, 1), torch.randint(10, (count,), generator=generator)


class Contender:
    """A network in training with one defence; a call makes one step."""

    def __init__(self, defense: Defense | None, width: int, x: Tensor, y: Tensor) -> None:
        torch.manual_seed(0)
        self.model = ResNet18(10, width=width).to(x.device)
        self.stack = Stack([] if defense is None else [defense])
        self.stack.prepare(self.model)
        self.stack.train_mode()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.x, self.y = x, y

    def __call__(self) -> None:
        step = Step(self.model, self.x, self.y, Rng(0, range(len(self.x))))
        self.stack.train_batch(step, self.optimizer)


def gradient(model: nn.Module, defense: FlowGradientRegularization, x: Tensor, y: Tensor) -> Tensor:
    """Returns the gradient of the penalty with respect to all parameters."""
    penalty = defense.penalty(Step(model, x, y, Rng(0, range(len(x)))))
    found = torch.autograd.grad(penalty, list(model.parameters()), materialize_grads=True)
    return torch.cat([part.flatten() for part in found]).double()


def cosines(name: str, model: nn.Module, x: Tensor, y: Tensor) -> list[Row]:
    """Returns a row for each rho: the cosine of the differenced and the exact gradient; ratio is that of lengths."""
    exact = gradient(model, FlowGradientRegularization(), x, y)
    found = []
    for rho in RHOS:
        differenced = gradient(model, FlowGradientRegularization(gradient="difference", rho=rho), x, y)
        cosine = float(F.cosine_similarity(differenced, exact, dim=0))
        ratio = float(differenced.norm() / exact.norm())
        values = {"median": cosine, "low": cosine, "high": cosine}
        row = Row(
            case=f"{name}, rho {rho:g}", contender=DIFFERENCE, unit="cosine", ratio=ratio, relative_to=EXACT, **values
        )
        found.append(row)
    return found


def warm_up(model: nn.Module, steps: int, batch: int) -> None:
    """Trains on images whose class is a tenth of the range of their mean brightness."""
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(steps):
        x, _ = (tensor.to(device) for tensor in a_batch(batch, seed=1 + step))
        y = (x.mean((1, 2, 3)).argsort().argsort() * 10) // batch
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def networks(width: int, x: Tensor, y: Tensor) -> list[tuple[str, nn.Module, Tensor, Tensor]]:
    """Returns networks in train mode with a batch for each: without training, after some steps, and trained."""
    found: list[tuple[str, nn.Module, Tensor, Tensor]] = []
    for name, activation in (("SiLU", F.silu), ("ReLU", F.relu)):
        for steps in (0, 30):
            torch.manual_seed(0)
            model = ResNet18(10, width=width, activation=activation).to(x.device).train()
            warm_up(model, steps, len(x))
            found.append((f"{name}, {steps} steps", model, x, y))
    digits = robplug.dataset("digits", split="test").head(128)
    trained = robplug.target("robplug/digits-standard").module.to(x.device).train()
    return [*found, ("ReLU, trained digits CNN", trained, digits.x.to(x.device), digits.y.to(x.device))]


def findings(found: list[Row]) -> list[str]:
    """Returns what the limits say, and the best cosine of each network with kinks."""
    said = []
    for row in found:
        if row.contender in LIMITS and row.unit == "ms":
            limit = LIMITS[row.contender]
            said.append(f"{row.contender}: x{row.ratio:.2f} a plain step, limit {limit}: {verdict(row.ratio <= limit)}")
        if row.case.startswith("SiLU") and row.case.endswith("rho 0.001"):
            said.append(f"{row.case}: cosine {row.median:.4f}, limit 0.999: {verdict(row.median >= 0.999)}")
    kinks = [row for row in found if row.case.startswith("ReLU")]
    for name in dict.fromkeys(row.case.rpartition(", rho")[0] for row in kinks):
        best = max((row for row in kinks if row.case.startswith(f"{name}, rho")), key=lambda row: row.median)
        said.append(f"{name}: cosine {best.median:.3f} at best ({best.case}); the difference samples the kinks as well")
    return said


def verdict(kept: bool) -> str:
    """Returns how a limit was met."""
    return "WIN" if kept else "LOSS"


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--width", type=int, default=64, help="channels of the first layer")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "step_cost.json")
    options = parser.parse_args()
    heap = keep_heap()
    x, y = (tensor.to(options.device) for tensor in a_batch(options.batch))
    defenses: dict[str, Defense | None] = {
        PLAIN: None,
        TWICE: Twice(),
        SAMPLER: Sampler(),
        EXACT: FlowGradientRegularization(),
        DIFFERENCE: FlowGradientRegularization(gradient="difference"),
    }
    steps = {name: Contender(defense, options.width, x, y) for name, defense in defenses.items()}
    found = rows("ResNet-18, 3x32x32", timed(steps, options.repeats, warmup=2), PLAIN, scale=1000, unit="ms")
    for network in networks(options.width, x, y):
        found += cosines(*network)
    result = Result(
        benchmark="step_cost",
        command="python plugins/robplug-flow/benchmarks/step_cost.py",
        settings={
            "repeats": options.repeats,
            "batch": options.batch,
            "width": options.width,
            "device": options.device,
            "heap": heap,
        },
        rows=found,
        findings=findings(found),
        **surroundings(),
    )
    write(result, options.out)


if __name__ == "__main__":
    main()

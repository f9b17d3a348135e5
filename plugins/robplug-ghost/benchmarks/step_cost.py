"""Cost of an attack's step on a longitudinal ensemble of ghosts, beside one on the network itself.

    python plugins/robplug-ghost/benchmarks/step_cost.py

A step is the gradient of the loss with respect to the images and the images moved by its sign, as in I-FGSM, on
ResNet-20 with images of 32x32 and on ResNet-50 with images of 224x224, both untrained. Rounds go through all contenders
in turn; a ratio is the median over rounds of time relative to the plain step. Two plain steps in a round tell how far
two equal things differ.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robplug.zoo import resnet20
from robplug_ghost import GhostNetwork

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from schema import Result, Row, keep_heap, rows, surroundings, timed, write

PLAIN, AGAIN = "plain step", "plain step, again"
SKIP, DROPOUT, BOTH = "skip erosion", "dropout erosion", "both erosions"
SAMPLED = "dropout for each sample"
LIMIT = {"cpu": 1.1, "cuda": 1.05}


class Bottleneck(nn.Module):
    """The block of ResNet-50: 1x1, 3x3 and 1x1 convolutions beside a shortcut (He et al. 2016, figure 5)."""

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or channels_in != 4 * width:
            projection = nn.Conv2d(channels_in, 4 * width, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def resnet50() -> nn.Module:
    """Returns an untrained ResNet-50."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, stride=2, padding=1))
    channels = 64
    for stage, count in enumerate((3, 4, 6, 3)):
        for block in range(count):
            layers.append(Bottleneck(channels, 64 << stage, 2 if stage and not block else 1))
            channels = 4 * (64 << stage)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))


class Sampled(nn.Module):
    """Dropout that is on in eval mode and draws for each sample, as one writes it."""

    def __init__(self, block: nn.Module, keep: float) -> None:
        super().__init__()
        self.block, self.drop = block, 1 - keep

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.block(x), self.drop, training=True)


def sampled(model: nn.Module, keep: float) -> nn.Module:
    """Returns a network with such a dropout after each residual block, sharing all layers."""
    ends = [name.removeprefix("dropout erosion after ") for name in GhostNetwork(model, dropout=keep).found]
    ghost = GhostNetwork(model, dropout=keep)
    for name in ends:
        parent = ghost.network.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], Sampled(model.get_submodule(name), keep))
    return ghost.network


def attacker(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    """Returns a step of I-FGSM."""

    def step() -> Tensor:
        leaf = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)
        return (x + gradient.sign() / 255).clamp_(0, 1)

    return step


def measure(name: str, model: nn.Module, x: Tensor, repeats: int) -> list[Row]:
    """Returns a row for each contender on one network."""
    model = model.to(x.device).eval().requires_grad_(False)
    y = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    contenders = {
        PLAIN: model,
        AGAIN: model,
        SKIP: GhostNetwork(model, skip=0.22),
        DROPOUT: GhostNetwork(model, dropout=0.994),
        BOTH: GhostNetwork(model, skip=0.22, dropout=0.994),
        SAMPLED: sampled(model, 0.994),
    }
    steps = {contender: attacker(network, x, y) for contender, network in contenders.items()}
    case = f"{name}, batch {len(x)}"
    return rows(case, timed(steps, repeats, warmup=2), PLAIN, scale=1000, unit="ms")


def findings(found: list[Row], device: str) -> list[str]:
    """Returns how each erosion stands to its limit."""
    said = []
    for row in found:
        if row.contender in (SKIP, DROPOUT):
            verdict = "WIN" if row.ratio <= LIMIT[device] else "LOSS"
            said.append(f"{row.case}: {row.contender}: x{row.ratio:.3f} a plain step, limit {LIMIT[device]}: {verdict}")
        elif row.contender != PLAIN:
            said.append(f"{row.case}: {row.contender}: x{row.ratio:.3f} a plain step")
    return said


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--small", type=int, nargs="+", default=[32, 128], help="batches of ResNet-20")
    parser.add_argument("--large", type=int, nargs="+", default=[4], help="batches of ResNet-50")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "step_cost.json")
    options = parser.parse_args()
    heap = keep_heap()
    torch.manual_seed(0)
    found = []
    for name, model, side, batches in (
        ("ResNet-20, 3x32x32", resnet20(), 32, options.small),
        ("ResNet-50, 3x224x224", resnet50(), 224, options.large),
    ):
        for batch in batches:
            found += measure(name, model, torch.rand(batch, 3, side, side).to(options.device), options.repeats)
    result = Result(
        benchmark="step_cost",
        command="python plugins/robplug-ghost/benchmarks/step_cost.py",
        settings={
            "repeats": options.repeats,
            "small": options.small,
            "large": options.large,
            "device": options.device,
            "skip": 0.22,
            "dropout": 0.994,
            "heap": heap,
        },
        rows=found,
        findings=findings(found, options.device),
        **surroundings(),
    )
    write(result, options.out)


if __name__ == "__main__":
    main()

"""What Algorithm 1 costs beside the network: all of a step but the network's forward and backward pass.

    python plugins/robplug-dag/benchmarks/loop_cost.py

At 512x512 with 21 classes, as in Pascal VOC. The own work is `dag` on a network that costs nothing: its logits and its
gradient are made beforehand. Beside it in each round, the same `dag` on an untrained FCN with ResNet-50, laid out as
torchvision's, and the two passes of this network alone. The logits have the labels' resolution in all three.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robplug_dag import dag

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from schema import Result, Row, keep_heap, rows, surroundings, timed, write

OWN, NETWORK, WHOLE = "Algorithm 1 alone", "forward and backward pass", "dag"
CLASSES, SIDE = 21, 512
LIMIT = 0.03


class Bottleneck(nn.Module):
    """The block of ResNet-50: 1x1, 3x3 and 1x1 convolutions beside a shortcut (He et al. 2016, figure 5)."""

    def __init__(self, channels_in: int, width: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride=stride, padding=dilation, dilation=dilation, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, 4 * width, 1, bias=False),
            nn.BatchNorm2d(4 * width),
        )
        self.shortcut: nn.Module = nn.Identity()
        if channels_in != 4 * width:
            projection = nn.Conv2d(channels_in, 4 * width, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class FCN(nn.Module):
    """ResNet-50 whose last two stages are dilated in place of strided, and a head of two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
        layers.append(nn.MaxPool2d(3, stride=2, padding=1))
        channels = 64
        for width, count, stride, dilation in ((64, 3, 1, 1), (128, 4, 2, 1), (256, 6, 1, 2), (512, 3, 1, 4)):
            for block in range(count):
                layers.append(Bottleneck(channels, width, stride if not block else 1, dilation))
                channels = 4 * width
        layers += [nn.Conv2d(channels, 512, 3, padding=1, bias=False), nn.BatchNorm2d(512), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(512, CLASSES, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.layers(x), size=x.shape[-2:], mode="bilinear", align_corners=False)


class Free(torch.autograd.Function):
    """A network that costs nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, logits: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return ctx.gradient, None, None


def contenders(batch: int, steps: int, device: str) -> dict[str, Callable[[], object]]:
    """Returns what is timed; each makes all the steps."""
    model = FCN().eval().requires_grad_(False).to(device)
    x = torch.rand(batch, 3, SIDE, SIDE, device=device)
    with torch.no_grad():
        logits = model(x)
    labels = logits.argmax(1)
    goals = (labels + 1) % CLASSES
    gradient, upstream = torch.randn_like(x), torch.randn_like(logits)

    def passes() -> None:
        for _ in range(steps):
            leaf = x.detach().requires_grad_()
            torch.autograd.grad(model(leaf), leaf, upstream)

    def whole() -> None:
        _, record = dag(model, x, labels, goals, steps=steps, gamma=1e-9)
        assert (record.iterations == steps).all()  # nobody left: steps this small change no prediction

    own = lambda: dag(lambda x: Free.apply(x, logits, gradient), x, labels, goals, steps=steps)  # noqa: E731
    return {OWN: own, NETWORK: passes, WHOLE: whole}


def finding(times: dict[str, list[float]]) -> str:
    """Returns how the own work stands to its limit."""
    share = statistics.median(own / (own + net) for own, net in zip(times[OWN], times[NETWORK], strict=True))
    verdict = "WIN" if share <= LIMIT else "LOSS"
    return f"Algorithm 1 is {share:.2%} of a step of {SIDE}x{SIDE} with {CLASSES} classes, limit {LIMIT:.0%}: {verdict}"


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3, help="of each contender in a round")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "loop_cost.json")
    options = parser.parse_args()
    heap = keep_heap()
    torch.manual_seed(0)
    times = timed(contenders(options.batch, options.steps, options.device), options.repeats)
    case = f"FCN with ResNet-50, {options.batch}x3x{SIDE}x{SIDE}, a step"
    found: list[Row] = rows(case, times, NETWORK, scale=1e3 / options.steps, unit="ms")
    settings = {"repeats": options.repeats, "batch": options.batch, "steps": options.steps, "device": options.device}
    result = Result(
        benchmark="robplug-dag loop cost",
        command="python plugins/robplug-dag/benchmarks/loop_cost.py",
        settings={**settings, "heap": heap},
        rows=found,
        findings=[finding(times)],
        **surroundings(),
    )
    write(result, options.out)


if __name__ == "__main__":
    main()

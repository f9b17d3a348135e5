"""Small fixed models on 1x8x8 images, right about their samples by margins that begin near nothing.

They are fitted in closed form and the same in every process. Whoever builds one leaves the global random numbers as
they were.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robplug.isolation import seeded_globals
from robplug.targets import Target, from_module

SHAPE = (1, 8, 8)
CLASSES = 4
SAMPLES = 20
WIDE = (-2.0, 3.0)


@dataclass(frozen=True)
class Scene:
    """A target and samples that it classifies rightly.

    Attributes:
        target: the model under attack.
        x: (20, 1, 8, 8) samples, some of whose values stand at the bounds.
        y: (20,) int64 labels.
    """

    target: Target
    x: Tensor
    y: Tensor

    @torch.no_grad()
    def ranked(self, rank: int) -> Tensor:
        """Returns (20,) the classes with the rank-th largest logits; 0 is the prediction, 1 the runner-up."""
        return self.target.logits(self.x).argsort(dim=1, descending=True)[:, rank]


def network(bounds: tuple[float, float] = (0.0, 1.0), dtype: torch.dtype = torch.float32) -> Scene:
    """Returns a fresh convolutional network with batch norm and dropout, four classes.

    All of it is in eval mode but for one part without any effect; one parameter is frozen; some have a ``.grad``.
    Whatever an attack sets anew shows therefore.
    """
    net, x, y = copy.deepcopy(_fitted())
    low, high = bounds
    module = _Rescaled(net, low, high).to(dtype)
    module.eval()
    module.unused.train()
    net.conv.bias.requires_grad_(False)  # type: ignore[union-attr]
    net.norm.weight.grad = torch.ones_like(net.norm.weight)
    target = from_module(module, bounds=bounds, classes=CLASSES)
    return Scene(target, (low + (high - low) * x.to(dtype)).clamp_(low, high), y)


class _Rescaled(nn.Module):
    def __init__(self, net: nn.Module, low: float, high: float) -> None:
        super().__init__()
        self.net = net
        self.unused = nn.Identity()
        self.low, self.width = low, high - low

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - self.low) / self.width)  # type: ignore[no-any-return]


class _Network(nn.Module):
    """Random features with a readout fitted by ridge regression."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6, momentum=1.0)
        self.dropout = nn.Dropout(0.2)
        self.readout = nn.Linear(6 * 64, CLASSES, bias=False)

    def features(self, x: Tensor) -> Tensor:
        return self.dropout(F.relu(self.norm(self.conv(x)))).flatten(1)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.features(x))  # type: ignore[no-any-return]


@functools.cache
@torch.no_grad()
def _fitted() -> tuple[_Network, Tensor, Tensor]:
    with seeded_globals(0):
        x, y = _images(1000)
        net = _Network()
        net.features(x)  # in training mode with momentum 1: batch norm takes these statistics
        net.eval()
        features = net.features(x).double()
        ridge = features.T @ features + 10.0 * torch.eye(features.shape[1], dtype=torch.float64)
        goals = F.one_hot(y, CLASSES).double() - 1 / CLASSES
        net.readout.weight.copy_(10.0 * torch.linalg.solve(ridge, features.T @ goals).T)
        kept = _spread(net(x), y)
    return net, x[kept], y[kept]


def _spread(logits: Tensor, y: Tensor) -> Tensor:
    """Returns the indices of samples that are classified rightly, from the narrowest margin to the widest."""
    top = logits.topk(2).values
    right = (logits.argmax(1) == y).nonzero().flatten()
    ordered: Tensor = right[(top[:, 0] - top[:, 1])[right].argsort()]
    narrow_first = torch.linspace(0, 1, SAMPLES).square() * (len(ordered) - 1)
    return ordered[narrow_first.long()]


def _images(count: int) -> tuple[Tensor, Tensor]:
    """Returns noisy mixtures of two gratings; the label is the stronger one."""
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    angles = torch.stack([rows, columns, rows + columns, rows - columns]) * 1.2
    gratings = 0.5 + 0.5 * angles.cos()
    y = torch.arange(count) % CLASSES
    other = (y + torch.randint(1, CLASSES, (count,))) % CLASSES
    share = 0.5 * torch.rand(count, 1, 1)
    clean = (1 - share) * gratings[y] + share * gratings[other]
    noise = 0.1 * torch.randn(count, 8, 8)
    return (clean + noise).clamp(0, 1)[:, None], y


@dataclass(frozen=True)
class LinearScene(Scene):
    """Two classes separated by a plane, so that every distance to the other class has a closed form."""

    weight: Tensor

    def distances(self, norm: str) -> Tensor:
        """Returns (20,) the smallest distance to the other class in linf, l2 or l1; no bound is in the way."""
        dual = {"linf": 1.0, "l2": 2.0, "l1": float("inf")}[norm]
        length: Tensor = torch.linalg.vector_norm(self.weight, ord=dual)
        logits = self.target.logits(self.x).detach()
        return (logits[:, 1] - logits[:, 0]).abs() / length


def linear() -> LinearScene:
    """Returns a linear model; the linf distances of its samples spread from 0.002 to 0.04."""
    with seeded_globals(0):
        weight = (0.5 + 0.5 * torch.rand(64)) * torch.randn(64).sign()
        noise = 0.5 + 0.05 * torch.randn(SAMPLES, 64)
        layer = nn.Linear(64, 2)
    y = torch.arange(SAMPLES) % 2
    margin = torch.linspace(0.002, 0.04, SAMPLES) * weight.abs().sum() * (2 * y - 1)
    x = noise + ((margin - (noise - 0.5) @ weight) / weight.square().sum())[:, None] * weight
    with torch.no_grad():
        layer.weight.copy_(torch.stack([-weight / 2, weight / 2]))
        layer.bias.copy_(torch.tensor([0.25, -0.25]) * weight.sum())
    module = nn.Sequential(nn.Flatten(), layer).eval()
    target = from_module(module, bounds=WIDE, classes=2)
    return LinearScene(target, x.view(SAMPLES, *SHAPE), y, weight)

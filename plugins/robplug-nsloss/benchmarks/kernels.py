"""Time and peak memory of the kernels beside eager PyTorch, torch._foreach and torch.compile.

    python plugins/robplug-nsloss/benchmarks/kernels.py

Forward, backward and both, on the CPU, or on the GPU where there is one, on the logits and ReLU outputs of three
networks; a shape names the network's input. Differences get gradients in the layers of both passes, sums of signs in
the noisy ones. A ratio is relative to eager PyTorch, so that below 1 is faster and above 1 a loss.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # read when torch is imported

import torch
from torch import Tensor

from robplug_nsloss.kernels.ops import accumulate_signs, mean_abs_difference, sphere_noise

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from kernel_case import Case, Function, Shape, benchmark

OURS, EAGER, COMPILED, FOREACH = "robplug-nsloss", "eager PyTorch", "torch.compile", "torch._foreach"
RADIUS = 1.0
NETWORKS: dict[Shape, tuple[str, list[tuple[int, ...]]]] = {
    (128, 3, 32, 32): ("ResNet-20", [(16, 32, 32)] * 7 + [(32, 16, 16)] * 6 + [(64, 8, 8)] * 6 + [(10,)]),
    (128, 1, 28, 28): ("LeNet", [(6, 28, 28), (16, 10, 10), (120,), (84,), (10,)]),
    (32, 3, 32, 32): (
        "VGG-11",
        [(64, 32, 32), (128, 16, 16), *[(256, 8, 8)] * 2, *[(512, 4, 4)] * 2, *[(512, 2, 2)] * 2, (10,)],
    ),
}
"""Of a batch's shape: name and shapes of a sample's activations."""


def plain_noise(x: Tensor, noise: Tensor) -> Tensor:
    """The noise as one writes it."""
    return x + RADIUS * noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def halves(layers: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the clean and the noisy layers."""
    return list(layers[: len(layers) // 2]), list(layers[len(layers) // 2 :])


def plain_differences(*layers: Tensor) -> Tensor:
    """The differences as one writes them."""
    return torch.stack([(noisy - clean).abs().mean() for clean, noisy in zip(*halves(layers), strict=True)]).sum()


def foreach_differences(*layers: Tensor) -> Tensor:
    """The differences of all layers by the library's operations on lists."""
    clean, noisy = halves(layers)
    norms = torch._foreach_norm(torch._foreach_sub(noisy, clean), 1)
    return torch.stack([norm / layer.numel() for norm, layer in zip(norms, noisy, strict=True)]).sum()


class Summing:
    """The differences together with sums of signs, which each contender has for itself."""

    def __init__(self, layers: Sequence[Tensor]) -> None:
        self.sums = [torch.zeros_like(layer, dtype=torch.int8) for layer in halves(layers)[1]]

    def ours(self, *layers: Tensor) -> Tensor:
        """The kernel, in a draw that adds to sums."""
        return accumulate_signs(*halves(layers), self.sums, 1).sum()

    def eager(self, *layers: Tensor) -> Tensor:
        """As one writes it."""
        clean, noisy = halves(layers)
        differences = [other - one for one, other in zip(clean, noisy, strict=True)]
        for total, difference in zip(self.sums, differences, strict=True):
            total.add_(difference.detach().sign().to(torch.int8))
        return torch.stack([difference.abs().mean() for difference in differences]).sum()


def cases(shape: Shape, device: str, compiled: bool) -> list[Case]:
    """Returns what is measured for one network: noise, differences, and differences with sums of signs."""
    name, sizes = NETWORKS[shape]
    x, noise = torch.rand(shape, device=device).requires_grad_(), torch.randn(shape, device=device)
    clean = [torch.randn(shape[0], *size, device=device).relu() for size in sizes]
    noisy = [(layer + 0.1 * torch.randn_like(layer)).relu() for layer in clean]
    both = (*(layer.clone().requires_grad_() for layer in (*clean, *noisy)),)
    one = (*clean, *(layer.clone().requires_grad_() for layer in noisy))

    def beside(ours: Function, eager: Function, **others: Function) -> dict[str, Function]:
        extra = {COMPILED: torch.compile(eager, dynamic=False)} if compiled else {}
        return {OURS: ours, EAGER: eager, **extra, **others}

    def differences(*layers: Tensor) -> Tensor:
        return mean_abs_difference(*halves(layers))

    def noised(x: Tensor, noise: Tensor) -> Tensor:
        return sphere_noise(x, noise, RADIUS)

    label = f"{name} {'x'.join(map(str, shape))}"
    summing = [Summing(one) for _ in range(2)]
    contenders = beside(differences, plain_differences, **{FOREACH: foreach_differences})
    return [
        Case(f"sphere_noise {label}", OURS, EAGER, beside(noised, plain_noise), (x, noise), plain_noise),
        Case(f"mean_abs_difference {label}", OURS, EAGER, contenders, both, plain_differences),
        Case(
            f"accumulate_signs {label}",
            OURS,
            EAGER,
            beside(summing[0].ours, summing[1].eager),
            one,
            plain_differences,
        ),
    ]


if __name__ == "__main__":
    benchmark("robplug-nsloss", {device: tuple(NETWORKS) for device in ("cpu", "cuda")}, cases, Path(__file__).parent)

"""What the tests share; the Triton kernels run in triton's interpreter where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from robplug.testing.kernels import interpret_without_gpu, poisoned, seeded

__all__ = ["poisoned", "seeded"]

interpret_without_gpu()
torch.set_num_threads(1)


def _plain_warp(x: Tensor, flow: Tensor) -> Tensor:
    """Bilinear sampling from its definition, with nothing but indexing; autograd knows the rest."""
    n, _, height, width = x.shape
    y = (torch.arange(height)[:, None].to(flow.dtype) + flow[:, 0]).clamp(0, height - 1)
    z = (torch.arange(width).to(flow.dtype) + flow[:, 1]).clamp(0, width - 1)
    top, left = y.detach().floor().long(), z.detach().floor().long()
    bottom, right = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
    down, along = (y - top)[:, None], (z - left)[:, None]
    sample = torch.arange(n)[:, None, None]

    def at(row: Tensor, col: Tensor) -> Tensor:
        return x[sample, :, row, col].permute(0, 3, 1, 2)

    upper = (1 - along) * at(top, left) + along * at(top, right)
    lower = (1 - along) * at(bottom, left) + along * at(bottom, right)
    return (1 - down) * upper + down * lower


def _plain_penalty(x: Tensor, g: Tensor, kappa_row: float = 1.0, kappa_col: float = 1.0) -> Tensor:
    """The closed form as one would type it."""
    by_row = (g[:, :, :-1] * (x[:, :, 1:] - x[:, :, :-1])).sum(1)
    by_col = (g[:, :, :, :-1] * (x[:, :, :, 1:] - x[:, :, :, :-1])).sum(1)
    return kappa_row**2 * by_row.square().sum((1, 2)) + kappa_col**2 * by_col.square().sum((1, 2))


def _plain_smoothness(flow: Tensor, neighbours: str) -> Tensor:
    """The sum over all pixels and all their neighbours, pixel by pixel."""
    moves = {"adjacent": ((-1, 0), (1, 0), (0, -1), (0, 1)), "diagonal": ((-1, -1), (-1, 1), (1, -1), (1, 1))}
    n, _, height, width = flow.shape
    total = flow.new_zeros(n)
    for row in range(height):
        for col in range(width):
            for down, along in moves[neighbours]:
                if 0 <= row + down < height and 0 <= col + along < width:
                    change = flow[:, :, row, col] - flow[:, :, row + down, col + along]
                    total = total + (change.square().sum(1) + 1e-8).sqrt()
    return total


def _plain_steps(
    loss: Callable[[Tensor], Tensor], x: Tensor, eps: float, sides: tuple[float, float], steps: int
) -> Tensor:
    """The paper's equation 2 with a flow: from no flow, steps of eps / steps along the sign, each clamped to eps.

    A flow may come back to 0, where the side of the rounding counts: steps are added in one operation, as in a loop.
    """
    unit = torch.tensor(sides, dtype=x.dtype).view(2, 1, 1)
    flow = torch.zeros(len(x), 2, *x.shape[2:], dtype=x.dtype)
    for _ in range(steps):
        flow.requires_grad_()
        (slope,) = torch.autograd.grad(loss(_plain_warp(x, flow)), flow)
        flow = flow.detach().add(slope.sign() * unit, alpha=eps / steps).clamp(-eps * unit, eps * unit)
    return flow


@pytest.fixture
def plain_steps() -> Callable[..., Tensor]:
    return _plain_steps


@pytest.fixture
def plain_warp() -> Callable[..., Tensor]:
    return _plain_warp


@pytest.fixture
def plain_penalty() -> Callable[..., Tensor]:
    return _plain_penalty


@pytest.fixture
def plain_smoothness() -> Callable[..., Tensor]:
    return _plain_smoothness

"""The gradient of the flow gradient penalty by one more first-order pass, without double backward.

P = sum over samples of |A g|^2, where g = dL/dx is the input gradient of the summed loss and A, which depends on x
alone, turns it into the flow gradient. Then dP/dtheta = 2 d/dh [dL/dtheta at x + h u] at h = 0 with u = A^T A g held
fixed, and the derivative along h becomes a difference.

For smooth activations that is the exact gradient but for rounding and curvature. Where an activation has a kink, double
backward omits the jump of the slope, and the difference samples it: another estimator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robplug.step import Step
from robplug_flow.kernels.ops import flow_gradient_penalty


@dataclass(frozen=True)
class Differentiated:
    """The clean pass of a step, differentiated once by images and parameters together.

    Attributes:
        x: (N, C, H, W) images.
        by_x: gradient of the summed loss.
        loss: the summed loss, a scalar; to differentiate it by parameters costs nothing, as that has been done.
        numbers: states of the global generators before the pass, or None if it drew nothing.
    """

    x: Tensor
    by_x: Tensor
    loss: Tensor
    numbers: list[Tensor] | None


class _Known(torch.autograd.Function):
    """A value whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if g is None else upstream[0].to(g.dtype) * g for g in ctx.gradients)


def differentiated(step: Step) -> Differentiated:
    """Makes the clean pass of a step, for the objective, and differentiates it."""
    before = _global_numbers(step.x.device)
    clean = step.clean()
    numbers = None if _same(before, _global_numbers(step.x.device)) else before
    parameters = [parameter for parameter in step.model.parameters() if parameter.requires_grad]
    # kept, as penalties of other defences may want the pass as well
    by_x, *gradients = torch.autograd.grad(
        clean.loss.sum(), [clean.x, *parameters], retain_graph=True, allow_unused=True
    )
    loss: Tensor = _Known.apply(clean.loss.detach().sum(), gradients, *parameters)  # type: ignore[no-untyped-call]
    return Differentiated(clean.x.detach(), by_x, loss, numbers)


def flow_gradient_difference(
    step: Step, kappa_row: float, kappa_col: float, rho: float, known: Differentiated | None = None
) -> Tensor:
    """Returns the flow gradient penalty summed over the clean batch, with the differenced gradient.

    Batch norm that works with the statistics of the batch couples samples, so that one h serves them all. Dropout makes
    the same draws in both passes.

    Args:
        step: its buffers must be free to move, as they are inside of `robplug.defenses.Stack`.
        kappa_row: pixels per unit of the flow, along rows.
        kappa_col: likewise along columns.
        rho: mean length of the displacement h u, as a share of the images' mean length.
        known: the clean pass, if the objective has differentiated it.
    """
    before = _global_numbers(step.x.device)
    if known is not None:
        base = known.loss
        total, moved, factor = _displaced(known.x, known.by_x, kappa_row, kappa_col, rho)
        _rewind(step.x.device, known.numbers or before)
        loss = step.loss_of(step.model(moved), step.y)
        _rewind(step.x.device, before)
    else:
        clean = step.clean()
        base = clean.loss.sum()
        total, moved, factor = _displaced(clean.x, _by_images(base, clean.x), kappa_row, kappa_col, rho)
        numbers = _global_numbers(step.x.device)
        loss = step.loss_of(step.model(moved), step.y)
        if not _same(numbers, _global_numbers(step.x.device)):
            # the model draws, and nobody knows from where it drew in the clean pass: both passes again
            _rewind(step.x.device, before)
            x = step.x.detach().requires_grad_()
            base = step.loss_of(step.model(x), step.y).sum()
            total, moved, factor = _displaced(x, _by_images(base, x), kappa_row, kappa_col, rho)
            _rewind(step.x.device, before)
            loss = step.loss_of(step.model(moved), step.y)
    surrogate = factor * (loss.sum() - base)
    # the value of the one and the gradient of the other
    return total + (surrogate - surrogate.detach())


def _by_images(loss: Tensor, x: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
    return gradient


def _displaced(
    x: Tensor, gradient: Tensor, kappa_row: float, kappa_col: float, rho: float
) -> tuple[Tensor, Tensor, float | Tensor]:
    """Returns the penalty's value, x + h u, and the factor of the losses' difference, 2 / h."""
    x, gradient = x.detach(), gradient.requires_grad_()
    total = flow_gradient_penalty(x, gradient, kappa_row, kappa_col).sum()
    (twice_u,) = torch.autograd.grad(total, gradient)
    u = twice_u / 2
    length = x.flatten(1).norm(dim=1).mean()
    size = u.flatten(1).norm(dim=1).square().mean().sqrt()
    # images without any slope have no flow gradient: u = 0, and any h will do
    h = torch.where(size > 0, rho * length / size, torch.ones_like(size))
    return total.detach(), x + h * u, 2 / h


def _global_numbers(device: torch.device) -> list[Tensor]:
    on_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_device]


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _rewind(device: torch.device, numbers: list[Tensor]) -> None:
    torch.set_rng_state(numbers[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(numbers[1], device)

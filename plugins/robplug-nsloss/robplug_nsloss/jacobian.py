"""Jacobian regularisation: the squared Frobenius norm of the derivative of the logits by the samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robplug.errors import InputError
from robplug.step import untouched_buffers
from robplug_nsloss.noise import check_samples


def jacobian_penalty(
    model: nn.Module, x: Tensor, *, projections: int | None = 1, generator: torch.Generator | None = None
) -> Tensor:
    """Returns half the mean over the batch of ||J||_F^2, J the Jacobian of a sample's logits, to be added to any loss.

    It makes a forward pass of its own in the modes as they are, in which no running statistic moves. With dropout on,
    J is that of the network with the units of one draw. With batch norm in train mode samples depend on each other
    through the statistics, and what is differentiated is the sum over the batch; in eval mode J is a sample's own.

    Args:
        model: maps samples to logits, (B, C).
        x: (B, ...) samples.
        projections: n random directions, uniform on the sphere in R^C, for the unbiased estimate
            C / n * ||J^T v||^2 of ||J||_F^2, each at the cost of a backward pass; None means exactly, at the cost of C.
        generator: of the directions, on the device of x; None means PyTorch's global one.

    Returns:
        A scalar.

    Differentiable: once, in the parameters of the model, by double backward; not in x.

    Raises:
        InputError: projections, samples or logits do not fit.

    Source: Hoffman et al. 2019, Robust Learning with Jacobian Regularization, section 2.3, algorithm 1, taken over by
        Fidel et al. 2020, section III-C.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> penalty = jacobian_penalty(model, torch.rand(2, 4))
        >>> penalty.backward()
    """
    check_projections(projections)
    check_samples(x)
    wanted = torch.is_grad_enabled()
    with untouched_buffers(model), torch.enable_grad():
        x = x.detach().requires_grad_()
        value = penalty_of(model(x), x, projections, generator, keep_graph=wanted)
    return value if wanted else value.detach()


def penalty_of(
    logits: Tensor, x: Tensor, projections: int | None, generator: torch.Generator | None, keep_graph: bool = True
) -> Tensor:
    """Returns `jacobian_penalty` of a pass that has been made.

    Args:
        logits: (B, C), with the graph that leads to x.
        x: (B, ...).
        projections: as there.
        generator: as there.
        keep_graph: whether the result is to be differentiated.
    """
    if logits.dim() != 2:
        raise InputError("logits of shape (B, C)", tuple(logits.shape))
    logits = _single(logits)
    squares = []
    for direction in _directions(logits, projections, generator):
        # retained also for the next direction
        (slope,) = torch.autograd.grad(
            (logits * direction).sum(), x, retain_graph=True, create_graph=keep_graph, materialize_grads=True
        )
        squares.append(_single(slope).square().sum())
    share = 1.0 if projections is None else logits.shape[1] / projections
    return torch.stack(squares).sum() * (share / (2 * len(x)))


def _directions(logits: Tensor, projections: int | None, generator: torch.Generator | None) -> list[Tensor]:
    """Returns unit vectors, (B, C) or (C,): random ones, or those of the axes."""
    logits = logits.detach()
    if projections is None:
        return list(torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device))
    draws = (
        torch.randn(logits.shape, dtype=logits.dtype, device=logits.device, generator=generator)
        for _ in range(projections)
    )
    return [draw / torch.linalg.vector_norm(draw, dim=1, keepdim=True) for draw in draws]


def _single(tensor: Tensor) -> Tensor:
    """Returns half precision as single: squares of small slopes underflow."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_projections(projections: int | None) -> None:
    """Refuses less than one direction."""
    if projections is not None and projections < 1:
        raise InputError("projections >= 1, or None for the exact Jacobian", projections)

"""Batch norm by known statistics against PyTorch's, in double precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from robplug_nsloss import ns_loss
from robplug_nsloss.activations import passes_of, recording
from robplug_nsloss.kernels import numba_impl
from robplug_nsloss.kernels.batch_norm import _Native, batch_norm

Precisions = Callable[[nn.Module], list[str]]
Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

SHAPES = [(2, 3, 5), (1, 70, 1), (3, 5, 7, 7), (2, 3, 4, 5, 6), (9, 16, 33, 33), (2, 3, 5 * numba_impl.STRIP + 1)]
EPS = 1e-3


def case(*shape: int) -> Case:
    """Returns samples, mean, variance, weight and bias; a variance is 0 and a weight negative."""
    channels = shape[1]
    x, mean, variance = 3 + torch.randn(shape), 3 + 0.1 * torch.randn(channels), torch.rand(channels)
    variance[0] = 0
    weight = torch.randn(channels)
    weight[-1] = -1
    learnt = (tensor.requires_grad_() for tensor in (weight, torch.randn(channels)))
    return x.requires_grad_(), mean, variance, *learnt  # type: ignore[return-value]


def in_double(tensors: Case) -> Case:
    return tuple(t.detach().double().requires_grad_(t.requires_grad) for t in tensors)  # type: ignore[return-value]


def gradients(function: Callable[..., Tensor], tensors: Case, g: Tensor) -> tuple[Tensor, ...]:
    out = function(*tensors, eps=EPS)
    return torch.autograd.grad(out, [tensor for tensor in tensors if tensor.requires_grad], g.to(out.dtype))


def assert_near(ours: tuple[Tensor, ...], exact: tuple[Tensor, ...], share: float) -> None:
    """Compares to a share of the largest value."""
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=share, atol=share * float(other.abs().max()))


def is_own(out: Tensor) -> bool:
    return isinstance(out.grad_fn, _Native._backward_cls)  # type: ignore[attr-defined]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_pytorch_in_double_precision(
    poisoned: None, shape: tuple[int, ...], threads: int
) -> None:
    tensors, g = case(*shape), 1 + torch.randn(shape)
    torch.set_num_threads(threads)
    try:
        assert is_own(batch_norm(*tensors, eps=EPS))
        assert torch.equal(batch_norm(*tensors, eps=EPS), F.batch_norm(*tensors, eps=EPS))
        ours = gradients(batch_norm, tensors, g)
    finally:
        torch.set_num_threads(1)
    assert_near(ours, gradients(F.batch_norm, in_double(tensors), g), 2e-6)


def test_sums_of_many_values_lose_no_more_than_their_rounding() -> None:
    tensors, g = case(40, 2, 200, 200), torch.rand(40, 2, 200, 200)
    assert_near(gradients(batch_norm, tensors, g), gradients(F.batch_norm, in_double(tensors), g), 2e-7)


def test_gradients_do_not_depend_on_the_number_of_threads() -> None:
    tensors, g, found = case(70, 6, 31, 33), torch.randn(70, 6, 31, 33), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(gradients(batch_norm, tensors, g))
    torch.set_num_threads(1)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


@pytest.mark.parametrize("frozen", [(3,), (4,), (3, 4)])
def test_weights_may_be_frozen(frozen: tuple[int, ...]) -> None:
    tensors, g = case(3, 5, 7, 7), torch.randn(3, 5, 7, 7)
    for number in frozen:
        tensors[number].requires_grad_(False)
    found = [gradients(function, tensors, g) for function in (batch_norm, F.batch_norm)]
    assert len(found[0]) == 3 - len(frozen)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradients_that_arrive_laid_out_otherwise() -> None:
    tensors = case(3, 5, 7, 7)
    last = torch.randn(3, 5, 7, 7).contiguous(memory_format=torch.channels_last)
    for g in (torch.randn(3, 5, 1, 1).expand(3, 5, 7, 7), last, last.mT):
        for ours, theirs in zip(gradients(batch_norm, tensors, g), gradients(F.batch_norm, tensors, g), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_nan_and_infinity_stay() -> None:
    for value in (math.nan, math.inf):
        tensors, g = case(3, 5, 7, 7), torch.zeros(3, 5, 7, 7)
        g[1, 2, 3, 4] = value
        for ours, theirs in zip(gradients(batch_norm, tensors, g), gradients(F.batch_norm, tensors, g), strict=True):
            torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_it_can_be_differentiated_twice() -> None:
    tensors, found = case(3, 5, 7, 7), []
    for function in (batch_norm, F.batch_norm):
        learnt = tensors[0], tensors[3], tensors[4]
        slopes = torch.autograd.grad(function(*tensors, eps=EPS).pow(3).sum(), learnt, create_graph=True)
        found.append(torch.autograd.grad(sum(slope.square().sum() for slope in slopes), learnt))
    assert_near(*found, 1e-6)


def test_transforms_of_functions_are_left_to_pytorch() -> None:
    x, *rest = (tensor.detach() for tensor in case(3, 5, 7, 7))
    found = []
    for function in (batch_norm, F.batch_norm):
        loss = lambda one, function=function: function(one[None], *rest, eps=EPS).pow(3).sum()  # noqa: E731
        found.append(torch.func.vmap(torch.func.grad(loss))(x))
    torch.testing.assert_close(*found)


def test_what_the_kernel_does_not_serve_is_pytorchs() -> None:
    x, mean, variance, weight, bias = case(4, 5, 6, 6)
    last = x.contiguous(memory_format=torch.channels_last)
    for args, training in (
        ((x, mean, variance, weight, bias), True),
        ((x, None, None, weight, bias), True),
        ((x, mean, variance, None, None), False),
        ((x, mean, variance, weight, None), False),
        ((x.detach(), mean, variance, weight, bias), False),
        ((x[:, :, 0, 0], mean, variance, weight, bias), False),
        ((last, mean, variance, weight, bias), False),
        ((x.bfloat16(), mean, variance, weight, bias), False),
        (in_double((x, mean, variance, weight, bias)), False),
        ((x, mean, variance, torch.rand(5, 2).unbind(1)[0], bias), False),
    ):
        kept = [None if row is None else row.clone() for row in args[1:3]]
        theirs = F.batch_norm(args[0], *kept, *args[3:], training=training, momentum=0.3, eps=EPS)
        ours = batch_norm(*args, training=training, momentum=0.3, eps=EPS)
        assert not is_own(ours) and torch.equal(ours, theirs)
        assert all(a is None or torch.equal(a, b) for a, b in zip(args[1:3], kept, strict=True))
    with pytest.raises(RuntimeError, match="running_mean should contain 5 elements"):
        batch_norm(x, mean[:3], variance[:3], weight, bias)
    with pytest.raises(RuntimeError, match="expected 1 dims"):
        batch_norm(x, mean, variance, weight[:, None], bias).square().sum().backward()
    with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'running_mean'"):
        batch_norm(x, mean.requires_grad_(), variance, weight, bias)


def network() -> nn.Sequential:
    norm = nn.BatchNorm2d(8)
    norm.running_mean, norm.running_var = torch.randn(8), 0.5 + torch.rand(8)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, bias=False), norm, nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)
    )


@pytest.mark.parametrize("training", [False, True])
def test_ns_loss_uses_it_and_is_what_it_is_in_double_precision(precisions: Precisions, training: bool) -> None:
    calls = precisions(network().train(training))
    assert calls.count("batch_norm_backward") == 3  # draws; the clean pass is the user's


def test_a_pass_that_is_recorded_stays_pytorchs() -> None:
    model, x = network().eval(), torch.rand(6, 2, 8, 8)
    norms = []
    model[1].register_forward_hook(lambda _, __, out: norms.append(out))
    with recording(model):
        model(x)
    with passes_of(model, None) as one_pass, one_pass(own=True):
        model(x)
    assert [is_own(out) for out in norms] == [False, True]


class Checkpointed(nn.Module):
    """Its parts' activations are computed again in the backward pass, when nobody looks on."""

    def __init__(self, parts: nn.Module) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.parts, x, use_reentrant=False)  # type: ignore[no-any-return]


def test_checkpoints_save_what_pytorch_saves() -> None:
    parts, x, found = network().eval(), torch.rand(6, 2, 8, 8), []
    for model in (nn.Sequential(*parts[:3]), Checkpointed(parts[:3])):
        whole = nn.Sequential(model, *parts[3:])
        loss = ns_loss(whole, x, draws=2, generator=torch.Generator().manual_seed(3))
        found.append(torch.autograd.grad(loss, list(parts.parameters())))
    assert_near(*found, 1e-6)


def test_other_modes_see_the_function() -> None:
    class Doubled(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            return 2 * out if func is F.batch_norm else out

    tensors, g = case(3, 5, 7, 7), torch.randn(3, 5, 7, 7)
    with Doubled():
        found = gradients(batch_norm, tensors, g)
    assert_near(found, gradients(F.batch_norm, tensors, 2 * g), 1e-6)


@pytest.mark.parametrize("eps", [1, True, np.float64(0.5)])
def test_eps_may_be_any_number(eps: float) -> None:
    tensors, g = case(3, 5, 7, 7), torch.randn(3, 5, 7, 7)
    ours, theirs = (torch.autograd.grad(f(*tensors, eps=eps), tensors[0], g) for f in (batch_norm, F.batch_norm))
    torch.testing.assert_close(ours, theirs)


def test_no_gradient_stays_none(nothing: Callable[[Tensor], Tensor]) -> None:
    tensors = case(3, 5, 7, 7)
    nothing(batch_norm(*tensors, eps=EPS)).sum().backward()
    assert all(tensor.grad is None for tensor in tensors)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_nobody_looks_at_gradients_that_nobody_wants() -> None:
    x, mean, variance, weight, bias = case(3, 5, 7, 7)
    with torch.no_grad():
        x[0, 0, 0, 0] = math.nan
    with torch.autograd.set_detect_anomaly(True):
        batch_norm(x, mean, variance, weight.detach(), bias.detach(), eps=EPS).sum().backward()
    assert bool(x.grad.isfinite().all())  # type: ignore[union-attr]

"""The flow gradient penalty against autograd through a sampler, and by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from robplug_flow import flow_gradient_penalty, warp
from robplug_flow.kernels import reference


def test_numbers_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0], [4.0, 8.0]])[None, None]
    g = torch.tensor([[1.0, 3.0], [5.0, 7.0]])[None, None]
    # rows: 1*(4-1) = 3, 3*(8-2) = 18; columns: 1*(2-1) = 1, 5*(8-4) = 20; nothing from the last row or column
    assert flow_gradient_penalty(x, g).tolist() == [9 + 324 + 1 + 400]
    assert flow_gradient_penalty(x, g, 2.0, 0.5).tolist() == [4 * (9 + 324) + (1 + 400) / 4]
    two = torch.cat([x, 2 * x], dim=1)
    # the channels are summed before the square: (3 + 2*3)^2 + ...
    assert flow_gradient_penalty(two, torch.cat([g, g], dim=1)).tolist() == [9 * (9 + 324 + 1 + 400)]


def test_a_constant_image_costs_nothing() -> None:
    x = torch.full((2, 3, 5, 7), 0.3)
    assert flow_gradient_penalty(x, torch.randn_like(x)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 1, 1, 1), (2, 2, 1, 4), (2, 2, 4, 1), (0, 3, 4, 4)])
def test_it_is_the_squared_norm_of_the_flow_gradient_at_zero(
    shape: tuple[int, ...], plain_warp: Callable[..., Tensor]
) -> None:
    x, g = torch.randn(2, *shape, dtype=torch.float64)
    kappa = (shape[2] - 1) / 2, (shape[3] - 1) / 2
    for sample in (plain_warp, warp):
        flow = torch.zeros(shape[0], 2, *shape[2:], dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(sample(x, flow), flow, g)
        assert torch.allclose(flow_gradient_penalty(x, g), slope.square().sum((1, 2, 3)), rtol=1e-12)
        normalised = slope * torch.tensor(kappa).view(2, 1, 1)
        assert torch.allclose(flow_gradient_penalty(x, g, *kappa), normalised.square().sum((1, 2, 3)), rtol=1e-12)


def test_training_through_the_network_equals_double_backward_of_the_sampler(plain_warp: Callable[..., Tensor]) -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(4 * 5 * 6, 3)).double()
    x, y = torch.randn(3, 2, 5, 6, dtype=torch.float64), torch.tensor([0, 1, 2])

    def loss(images: Tensor) -> Tensor:
        return nn.functional.cross_entropy(net(images), y, reduction="sum")

    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    flow = torch.zeros(3, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(plain_warp(x, flow)), flow, create_graph=True)
    ours = torch.autograd.grad(flow_gradient_penalty(x, g).sum(), tuple(net.parameters()), allow_unused=True)
    theirs = torch.autograd.grad(slope.square().sum(), tuple(net.parameters()), allow_unused=True)
    for one, other in zip(ours[:-1], theirs[:-1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_gradcheck_and_gradgradcheck() -> None:
    x, g = (tensor.requires_grad_() for tensor in torch.randn(2, 1, 2, 3, 4, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda x, g: flow_gradient_penalty(x, g, 1.5, 0.5), (x, g))
    assert torch.autograd.gradgradcheck(lambda x, g: flow_gradient_penalty(x, g, 1.5, 0.5), (x, g))
    assert torch.autograd.gradgradcheck(lambda g: flow_gradient_penalty(x.detach(), g, 1.5, 0.5), (g,))


def test_strides_and_parts_do_not_matter(poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    x, g = torch.randn(2, 5, 3, 6, 7)
    u = torch.rand(5)
    value = reference.flow_gradient_penalty(x, g, 1.0, 2.0)
    grads = reference.flow_gradient_penalty_gradient(u, x, g, 1.0, 2.0, True)
    gaps = torch.full((5, 3, 12, 14), torch.nan)
    sparse = gaps[:, :, ::2, ::2].copy_(x)
    monkeypatch.setattr(reference, "CHUNK", 256)
    for images in (x, sparse, x.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(reference.flow_gradient_penalty(images, g, 1.0, 2.0), value)
        for one, other in zip(
            reference.flow_gradient_penalty_gradient(u, images, g, 1.0, 2.0, True), grads, strict=True
        ):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_at_most_twice_as_far_from_the_truth_as_plain_torch(
    dtype: torch.dtype, plain_penalty: Callable[..., Tensor]
) -> None:
    x, g = torch.randn(2, 2, 3, 16, 16).to(dtype)
    u = torch.rand(2).to(dtype)

    def run(penalty: Callable[..., Tensor], to: torch.dtype) -> list[Tensor]:
        images, upstream = x.to(to).requires_grad_(), g.to(to).requires_grad_()
        value = penalty(images, upstream, 1.5, 0.5)
        return [value.detach(), *torch.autograd.grad(value, (images, upstream), u.to(value.dtype))]

    runs = run(flow_gradient_penalty, dtype), run(plain_penalty, dtype), run(plain_penalty, torch.float64)
    for label, ours, plain, truth in zip(("value", "x", "g"), *runs, strict=True):
        assert (ours - truth).abs().max() <= 2 * (plain - truth).abs().max(), label


def test_half_images_have_a_float32_penalty() -> None:
    """The sum over a large image is beyond the largest half, 65504."""
    x, g = torch.zeros(1, 1, 512, 512).half(), torch.ones(1, 1, 512, 512).half()
    x[:, :, ::2] = 1
    value = flow_gradient_penalty(x, g)
    assert value.dtype == torch.float32
    assert value.tolist() == [511.0 * 512]


def test_no_array_larger_than_x_is_made() -> None:
    class Largest(TorchDispatchMode):
        values = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            Largest.values = max([Largest.values, *(t.numel() for t in [out] if isinstance(t, Tensor))])
            return out

    x, g = torch.randn(2, 4, 3, 32, 32)
    with Largest():
        reference.flow_gradient_penalty(x, g, 1.0, 1.0)
        reference.flow_gradient_penalty_gradient(torch.ones(4), x, g, 1.0, 1.0, True)
    assert 0 < Largest.values <= x.numel()

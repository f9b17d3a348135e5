"""The warp against closed forms, indexing and `torch.nn.functional.grid_sample`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from robplug_flow import warp
from robplug_flow.kernels import reference

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHAPES = ((2, 3, 5, 7), (1, 1, 1, 1), (3, 2, 1, 6), (2, 1, 6, 1), (0, 3, 4, 4), (1, 1, 2048, 3), (1, 1, 3, 2048))


def off_the_kinks(shape: tuple[int, ...]) -> Tensor:
    """Returns a float64 flow whose coordinates stay clear of integers, some of them outside of the image."""
    whole = torch.randint(-3, 4, shape)
    return whole + torch.rand(shape, dtype=torch.float64) * 0.8 + 0.1


def grid_sample(x: Tensor, flow: Tensor) -> Tensor:
    height, width = x.shape[2:]
    rows, cols = torch.arange(height)[:, None] + flow[:, 0], torch.arange(width) + flow[:, 1]
    grid = torch.stack([2 * cols / (width - 1) - 1, 2 * rows / (height - 1) - 1], dim=-1)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_zero_flow_is_the_identity_bit_for_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    for images in (x, x.contiguous(memory_format=torch.channels_last)):
        out = warp(images, torch.zeros(shape[0], 2, *shape[2:], dtype=dtype))
        assert torch.equal(out, images)
        assert (out.dtype, out.stride()) == (dtype, images.stride())


@pytest.mark.parametrize("dtype", FLOATS)
def test_integer_flow_is_a_shift(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 6, 9).to(dtype)
    flow = torch.randint(-11, 12, (2, 2, 6, 9))
    rows = (torch.arange(6)[:, None] + flow[:, 0]).clamp(0, 5)
    cols = (torch.arange(9) + flow[:, 1]).clamp(0, 8)
    shifted = x[torch.arange(2)[:, None, None], :, rows, cols].permute(0, 3, 1, 2)
    assert torch.equal(warp(x, flow.to(dtype)), shifted)


def test_numbers_by_hand() -> None:
    """Channel 0 goes down the rows, channel 1 along the columns, and the flow says where a pixel comes from."""
    x = torch.tensor([[0.0, 1.0], [10.0, 11.0]])[None, None]
    flow = torch.zeros(1, 2, 2, 2)
    flow[0, :, 0, 0] = torch.tensor([0.5, 0.25])
    flow[0, :, 1, 1] = torch.tensor([-0.25, 7.0])
    assert torch.equal(warp(x, flow), torch.tensor([[5.25, 1.0], [10.0, 8.5]])[None, None])


@pytest.mark.parametrize("height", [1, 2, 31, 64, 100, 1000, 2048])
@pytest.mark.parametrize("at", [0.0, -2.0, 3.0])
def test_the_derivative_at_an_integer_is_the_forward_difference(height: int, at: float) -> None:
    """A sampler in normalised coordinates takes some rows on the wrong side (25 of 64 at 64 rows)."""
    x = torch.randn(1, 2, height, 3)
    flow = torch.zeros(1, 2, height, 3)
    flow[:, 0] = at
    for images, field, row in ((x, flow, 0), (x.transpose(2, 3), flow.flip(1).transpose(2, 3), 1)):
        field = field.clone().requires_grad_()
        (slope,) = torch.autograd.grad(warp(images, field).sum(), field)
        slope = slope[0, row] if row == 0 else slope[0, row].T
        here = torch.arange(height) + int(at)
        inside = ((here >= 0) & (here < height - 1))[:, None]
        first, second = (x[0][:, here.clamp(0, height - 1)], x[0][:, (here + 1).clamp(0, height - 1)])
        assert torch.equal(slope, torch.where(inside, (second - first).sum(0), 0.0))


def test_just_below_an_integer_the_derivative_is_the_backward_difference() -> None:
    """31 - 1e-9 is 31 in float32: the flow's fraction must be taken before the position is added."""
    x = torch.randn(1, 1, 40, 4)
    flow = torch.full((1, 2, 40, 4), -1e-9).requires_grad_()
    (slope,) = torch.autograd.grad(warp(x, flow).sum(), flow)
    assert torch.equal(slope[0, 0, 1:], (x[0, 0, 1:] - x[0, 0, :-1]))


@pytest.mark.parametrize("shape", [(2, 3, 6, 9), (1, 1, 2, 2), (3, 2, 17, 5)])
def test_grid_sample_agrees_off_the_kinks(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64).requires_grad_()
    flow = off_the_kinks((shape[0], 2, *shape[2:])).requires_grad_()
    upstream = torch.randn(shape, dtype=torch.float64)
    ours, theirs = warp(x, flow), grid_sample(x, flow)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    found, expected = (torch.autograd.grad(out, (x, flow), upstream) for out in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="grid_sample has no second derivative before torch 2.13")
def test_grid_sample_agrees_in_second_order() -> None:
    x = torch.randn(2, 3, 6, 9, dtype=torch.float64).requires_grad_()
    flow = off_the_kinks((2, 2, 6, 9)).requires_grad_()
    upstream = torch.randn_like(x).requires_grad_()
    weights = (torch.randn_like(x), torch.randn_like(flow))
    found = []
    for sample in (warp, grid_sample):
        firsts = torch.autograd.grad(sample(x, flow), (x, flow), upstream, create_graph=True)
        found.append(torch.autograd.grad(firsts, (x, flow, upstream), weights))
    torch.testing.assert_close(*found, rtol=0, atol=1e-10)


def test_gradcheck_and_gradgradcheck() -> None:
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64).requires_grad_()
    flow = off_the_kinks((1, 2, 3, 4)).requires_grad_()
    assert torch.autograd.gradcheck(warp, (x, flow))
    assert torch.autograd.gradgradcheck(warp, (x, flow))


def test_the_adjoint_is_the_adjoint() -> None:
    x, g, flow = (
        torch.randn(2, 3, 5, 7).double(),
        torch.randn(2, 3, 5, 7).double(),
        torch.randn(2, 2, 5, 7).double() * 4,
    )
    back = reference.warp_adjoint(g, flow)
    torch.testing.assert_close((back * x).sum(), (g * warp(x, flow)).sum(), rtol=1e-12, atol=0)


def test_strides_do_not_matter(poisoned: None, plain_warp: Callable[..., Tensor]) -> None:
    """The gaps between the values are NaN: whoever reads one shows it."""
    wide, flows = torch.full((2, 6, 10, 9), torch.nan), torch.full((2, 4, 5, 18), torch.nan)
    x, flow = wide[:, ::2, ::2], flows[:, 1::2, :, ::2]
    x.copy_(torch.randn(x.shape)), flow.copy_(torch.randn(flow.shape))
    for images in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        leaf, field = images.detach().requires_grad_(), flow.detach().requires_grad_()
        out = warp(leaf, field)
        torch.testing.assert_close(out, plain_warp(x, flow), rtol=1e-5, atol=1e-5)
        found = torch.autograd.grad(out.sum(), (leaf, field))  # the upstream gradient is one number, expanded
        other, other_field = x.detach().requires_grad_(), flow.detach().requires_grad_()
        expected = torch.autograd.grad(plain_warp(other, other_field).sum(), (other, other_field))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_batch_worked_on_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, g, flow = torch.randn(5, 2, 4, 3), torch.randn(5, 2, 4, 3), torch.randn(5, 2, 4, 3)
    whole = reference.warp(x, flow), reference.warp_adjoint(g, flow), reference.warp_flow_gradient(g, x, flow)
    monkeypatch.setattr(reference, "CHUNK", 48)
    parts = reference.warp(x, flow), reference.warp_adjoint(g, flow), reference.warp_flow_gradient(g, x, flow)
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))


def test_a_displacement_without_end_stops_at_the_edge_and_nan_stays() -> None:
    x = torch.randn(1, 2, 4, 5)
    flow = torch.zeros(1, 2, 4, 5)
    flow[0, 0, 1, 1], flow[0, 1, 2, 2], flow[0, 0, 3, 3] = torch.inf, -1e30, torch.nan
    out = warp(x, flow)
    assert torch.equal(out[0, :, 1, 1], x[0, :, 3, 1])
    assert torch.equal(out[0, :, 2, 2], x[0, :, 2, 0])
    assert out.isnan().nonzero()[:, 1:].tolist() == [[0, 3, 3], [1, 3, 3]]


def test_a_finer_flow_than_the_images() -> None:
    x, flow = torch.randn(1, 1, 8, 8).half(), torch.full((1, 2, 8, 8), 1e-5)
    flow.requires_grad_()
    out = warp(x, flow)
    assert out.dtype == torch.float16
    (slope,) = torch.autograd.grad(out.sum(), flow)
    assert slope.dtype == torch.float32
    torch.testing.assert_close(slope[0, 0, :-1], (x[0, 0, 1:].float() - x[0, 0, :-1].float()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_at_most_twice_as_far_from_the_truth_as_plain_torch(
    dtype: torch.dtype, plain_warp: Callable[..., Tensor]
) -> None:
    x, flow = torch.randn(2, 3, 16, 16).to(dtype), off_the_kinks((2, 2, 16, 16)).to(dtype)
    upstream = torch.randn(2, 3, 16, 16).to(dtype)

    def run(sample: Callable[..., Tensor], to: torch.dtype) -> list[Tensor]:
        images, field = x.to(to).requires_grad_(), flow.to(to).requires_grad_()
        out = sample(images, field)
        return [out.detach(), *torch.autograd.grad(out, (images, field), upstream.to(to))]

    for label, ours, plain, truth in zip(
        ("out", "x", "flow"), run(warp, dtype), run(plain_warp, dtype), run(plain_warp, torch.float64), strict=True
    ):
        assert (ours - truth).abs().max() <= 2 * (plain - truth).abs().max(), label


def test_a_large_image() -> None:
    x = torch.rand(1, 1, 2048, 2048)
    flow = torch.ones(1, 2, 2048, 2048)
    assert torch.equal(warp(x, flow), F.pad(x[:, :, 1:, 1:], (0, 1, 0, 1), mode="replicate"))

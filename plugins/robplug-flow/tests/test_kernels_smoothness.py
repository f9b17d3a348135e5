"""The flow loss against a sum written pixel by pixel, and by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from robplug_flow import flow_smoothness
from robplug_flow.kernels import reference

NEIGHBOURS = ("adjacent", "diagonal")


def test_numbers_by_hand() -> None:
    flow = torch.zeros(1, 2, 2, 2, dtype=torch.float64)
    flow[0, :, 0, 0] = torch.tensor([3.0, 4.0])
    # adjacent: two neighbours of the corner differ by 5, each pair counted twice, and two pairs do not differ
    assert flow_smoothness(flow).item() == pytest.approx(4 * 5 + 4 * 1e-4, rel=1e-8)
    assert flow_smoothness(flow, "diagonal").item() == pytest.approx(2 * 5 + 2 * 1e-4, rel=1e-8)


@pytest.mark.parametrize("shape", [(2, 2, 5, 7), (1, 2, 1, 1), (1, 2, 1, 6), (1, 2, 6, 1), (0, 2, 3, 3)])
def test_a_constant_flow_costs_a_ten_thousandth_a_term(shape: tuple[int, ...]) -> None:
    n, _, height, width = shape
    flow = torch.full(shape, 0.7, dtype=torch.float64).requires_grad_()
    terms = {"adjacent": 2 * (2 * height * width - height - width), "diagonal": 4 * (height - 1) * (width - 1)}
    for neighbours in NEIGHBOURS:
        value = flow_smoothness(flow, neighbours)
        assert value.tolist() == pytest.approx([1e-4 * terms[neighbours]] * n, rel=1e-12)
        assert not torch.autograd.grad(value.sum(), flow)[0].any()


@pytest.mark.parametrize("neighbours", NEIGHBOURS)
@pytest.mark.parametrize("shape", [(2, 2, 4, 5), (1, 2, 1, 1), (2, 2, 1, 3), (2, 2, 3, 1)])
def test_the_sum_pixel_by_pixel(
    shape: tuple[int, ...], neighbours: str, plain_smoothness: Callable[..., Tensor]
) -> None:
    flow = torch.randn(shape, dtype=torch.float64).requires_grad_()
    upstream = torch.randn(shape[0], dtype=torch.float64)
    ours, theirs = flow_smoothness(flow, neighbours), plain_smoothness(flow, neighbours)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    if theirs.requires_grad:
        (slope,), (expected,) = (torch.autograd.grad(value, flow, upstream) for value in (ours, theirs))
        torch.testing.assert_close(slope, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("neighbours", NEIGHBOURS)
def test_gradcheck_and_gradgradcheck(neighbours: str) -> None:
    flow = torch.randn(1, 2, 3, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda flow: flow_smoothness(flow, neighbours), (flow,))
    assert torch.autograd.gradgradcheck(lambda flow: flow_smoothness(flow, neighbours), (flow,))


def test_value_and_gradient_are_differentiated_together(plain_smoothness: Callable[..., Tensor]) -> None:
    flow = torch.randn(2, 2, 3, 4, dtype=torch.float64).requires_grad_()
    found = []
    for smoothness in (flow_smoothness, plain_smoothness):
        value = smoothness(flow, "adjacent")
        (slope,) = torch.autograd.grad(value.sum(), flow, create_graph=True)
        found.append(torch.autograd.grad(value.square().sum() + slope.square().sum(), flow))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("neighbours", NEIGHBOURS)
def test_strides_and_parts_do_not_matter(poisoned: None, neighbours: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = torch.randn(5, 2, 6, 7)
    expected = reference.flow_smoothness(flow, neighbours)
    sparse = torch.full((5, 4, 6, 14), torch.nan)[:, ::2, :, ::2].copy_(flow)
    monkeypatch.setattr(reference, "CHUNK", 200)
    for field in (sparse, flow.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(reference.flow_smoothness(field, neighbours), expected)


@pytest.mark.parametrize("neighbours", NEIGHBOURS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_at_most_twice_as_far_from_the_truth_as_plain_torch(
    dtype: torch.dtype, neighbours: str, plain_smoothness: Callable[..., Tensor]
) -> None:
    flow, u = torch.randn(2, 2, 5, 6).to(dtype), torch.rand(2).to(dtype)

    def run(smoothness: Callable[..., Tensor], to: torch.dtype) -> list[Tensor]:
        field = flow.to(to).requires_grad_()
        value = smoothness(field, neighbours)
        return [value.detach(), *torch.autograd.grad(value, field, u.to(value.dtype))]

    runs = run(flow_smoothness, dtype), run(plain_smoothness, dtype), run(plain_smoothness, torch.float64)
    for label, ours, plain, truth in zip(("value", "flow"), *runs, strict=True):
        assert (ours - truth).abs().max() <= 2 * (plain - truth).abs().max(), label

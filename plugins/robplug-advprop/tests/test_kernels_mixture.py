"""The kernel against K calls of batch norm, its definition in float64, and finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robplug.testing.kernels import laid_out
from robplug_advprop import mixture_batch_norm
from robplug_advprop.kernels import reference

SIZES = [3, 4]


def inputs(
    shape: tuple[int, ...] = (7, 5, 4, 3), dtype: torch.dtype = torch.float64, mean: float = 2.0
) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(shape, dtype=dtype) * 3 + mean
    rows = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = (torch.randn(len(SIZES), shape[1], dtype=rows) for _ in range(2))
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


def one_by_one(x: Tensor, weight: Tensor, bias: Tensor, relu: bool = False) -> Tensor:
    """What public code does: split, call batch norm for each part, join."""
    parts = zip(x.split(SIZES), weight, bias, strict=True)
    out = torch.cat([F.batch_norm(part, None, None, w, b, training=True) for part, w, b in parts])
    return out.relu() if relu else out


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 6), (7, 5, 4, 3), (7, 5, 6, 7), (7, 2, 3, 4, 3), (7, 1, 1, 1)])
def test_value_and_gradients_are_those_of_batch_norm_part_by_part(shape: tuple[int, ...], relu: bool) -> None:
    leaves = inputs(shape)
    ours, theirs = mixture_batch_norm(leaves[0], SIZES, *leaves[1:], relu=relu), one_by_one(*leaves, relu=relu)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(ours)
    for mine, other in zip(torch.autograd.grad(ours, leaves, g), torch.autograd.grad(theirs, leaves, g), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


def test_it_is_what_its_definition_says() -> None:
    x, weight, bias = inputs()
    groups = []
    for part, w, b in zip(x.split(SIZES), weight, bias, strict=True):
        mean = part.mean((0, 2, 3), keepdim=True)
        deviation = ((part - mean).square().mean((0, 2, 3), keepdim=True) + 1e-3).sqrt()
        groups.append((part - mean) / deviation * w.view(1, -1, 1, 1) + b.view(1, -1, 1, 1))
    expected = torch.cat(groups)
    torch.testing.assert_close(mixture_batch_norm(x, SIZES, weight, bias, eps=1e-3), expected)
    torch.testing.assert_close(reference.definition(x, weight, bias, SIZES, 1e-3, False), expected)


def test_equal_groups_with_equal_state_give_equal_halves() -> None:
    x, weight, bias = inputs((4, 5, 3, 3), torch.float32)
    out = mixture_batch_norm(torch.cat([x, x]), [4, 4], weight[:1].expand(2, -1), bias[:1].expand(2, -1))
    assert torch.equal(out[:4], out[4:])


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("shape", "sizes"), [((7, 2, 2, 1), SIZES), ((3, 1, 32), [1, 2])])
def test_gradcheck_and_gradgradcheck(relu: bool, shape: tuple[int, ...], sizes: list[int]) -> None:
    leaves = inputs(shape)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return mixture_batch_norm(x, sizes, weight, bias, eps=1e-2, relu=relu)

    # no value lies on the kink
    assert mixture_batch_norm(leaves[0], sizes, *leaves[1:], eps=1e-2).abs().min() > 1e-4
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("relu", [False, True])
def test_the_gradient_by_hand_is_the_one_that_can_be_differentiated(relu: bool) -> None:
    leaves = inputs()
    out = mixture_batch_norm(leaves[0], SIZES, *leaves[1:], relu=relu)
    g = torch.randn_like(out)
    once = torch.autograd.grad(out, leaves, g, retain_graph=True)
    twice = torch.autograd.grad(out, leaves, g, create_graph=True)
    for mine, other in zip(once, twice, strict=True):
        assert not mine.requires_grad and other.requires_grad == (other is not twice[2])
        torch.testing.assert_close(mine, other.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_of_50_steps_are_those_of_plain_layers_fed_separately(momentum: float | None) -> None:
    plain = [nn.BatchNorm2d(5, momentum=momentum) for _ in SIZES]
    means, variances = torch.zeros(2, 5), torch.ones(2, 5)
    for step in range(50):
        x = torch.randn(7, 5, 4, 3) * (1 + step / 10) + step
        share = 1 / torch.tensor(step + 1.0) if momentum is None else momentum
        mixture_batch_norm(x, SIZES, running_mean=means, running_var=variances, momentum=share)
        for layer, part in zip(plain, x.split(SIZES), strict=True):
            layer(part)
    for layer, mean, var in zip(plain, means, variances, strict=True):
        torch.testing.assert_close(mean, layer.running_mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(var, layer.running_var, rtol=1e-6, atol=1e-6)


def test_a_momentum_for_each_group_and_rows_as_a_list() -> None:
    x, weight, bias = inputs(dtype=torch.float32)
    means, variances = [torch.zeros(5), torch.zeros(5)], [torch.ones(5), torch.ones(5)]
    out = mixture_batch_norm(x, SIZES, list(weight), list(bias), means, variances, momentum=[0.0, 1.0])
    torch.testing.assert_close(out, one_by_one(x, weight, bias), rtol=1e-5, atol=1e-5)
    assert not means[0].any() and bool((variances[0] == 1).all())
    torch.testing.assert_close(means[1], x[3:].detach().mean((0, 2, 3)))
    torch.testing.assert_close(variances[1], x[3:].detach().var((0, 2, 3)))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "gaps", "transposed"])
def test_strides_are_kept_and_matter_to_nothing(layout: str) -> None:
    x, weight, bias = inputs()
    other = laid_out(x.detach(), layout).requires_grad_()
    ours, expected = mixture_batch_norm(other, SIZES, weight, bias), one_by_one(x, weight, bias)
    assert ours.stride() == torch.empty_like(other).stride()
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    (mine,), (theirs,) = (torch.autograd.grad(out.square().sum(), leaf) for out, leaf in ((ours, other), (expected, x)))
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_channels_last_in_three_dimensions_and_a_gradient_that_is_one_number() -> None:
    x, weight, bias = inputs((7, 4, 2, 3, 2))
    other = x.detach().contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    ours, expected = mixture_batch_norm(other, SIZES, weight, bias, relu=True), one_by_one(x, weight, bias, relu=True)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    (mine,), (theirs,) = (torch.autograd.grad(out.sum(), leaf) for out, leaf in ((ours, other), (expected, x)))
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mean", [2.0, 30.0])
@pytest.mark.parametrize("shape", [(7, 5, 4, 3), (7, 5, 7, 7)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes_are_at_most_twice_as_far_from_the_truth_as_batch_norm(
    dtype: torch.dtype, shape: tuple[int, ...], mean: float
) -> None:
    leaves = inputs(shape, dtype, mean)
    truth = [leaf.detach().double().requires_grad_() for leaf in leaves]
    g = torch.randn(shape).to(dtype)
    exact = one_by_one(*truth)
    exact_gradients = torch.autograd.grad(exact, truth, g.double())
    theirs, ours = one_by_one(*leaves), mixture_batch_norm(leaves[0], SIZES, *leaves[1:])
    assert ours.dtype == dtype
    for mine, other, right in zip(
        (ours, *torch.autograd.grad(ours, leaves, g)),
        (theirs, *torch.autograd.grad(theirs, leaves, g)),
        (exact, *exact_gradients),
        strict=True,
    ):
        assert mine.dtype == other.dtype
        assert (mine - right).abs().max() <= 2 * (other - right).abs().max() + 1e-6


def test_autocast_changes_nothing() -> None:
    x, weight, bias = inputs(dtype=torch.bfloat16)
    out = mixture_batch_norm(x, SIZES, weight, bias)
    gradients = torch.autograd.grad(out.float().square().sum(), (x, weight, bias))
    with torch.autocast("cpu", torch.bfloat16):
        inside = mixture_batch_norm(x, SIZES, weight, bias)
        found = torch.autograd.grad(inside.float().square().sum(), (x, weight, bias))
    assert torch.equal(inside, out)
    assert all(torch.equal(mine, other) for mine, other in zip(found, gradients, strict=True))


@pytest.mark.parametrize("length", [4, 40])
def test_a_constant_channel_and_a_nan_stay_where_they_are(length: int) -> None:
    x = torch.randn(7, 3, length)
    x[:, 0], x[0, 1, 0] = 2.0, torch.nan
    bias = torch.tensor([[0.5, 0.0, 0.0], [0.25, 0.0, 0.0]])
    out = mixture_batch_norm(x, SIZES, bias=bias, relu=True)
    assert bool((out[:3, 0] == 0.5).all()) and bool((out[3:, 0] == 0.25).all())
    assert out.isnan().nonzero()[:, :2].unique(dim=0).tolist() == [[0, 1], [1, 1], [2, 1]]


def test_constant_rows_of_a_channel_that_is_not_constant() -> None:
    x = torch.arange(7.0, dtype=torch.float64)[:, None, None].expand(7, 2, 40).contiguous()
    expected = [F.batch_norm(part, None, None, training=True) for part in x.split(SIZES)]
    torch.testing.assert_close(mixture_batch_norm(x, SIZES), torch.cat(expected))


@pytest.mark.parametrize("length", [8, 64])
def test_the_variance_does_not_drown_in_the_mean(length: int) -> None:
    x = (torch.randn(7, 2, length, dtype=torch.float64) + 1e4).float()
    means, variances = torch.zeros(2, 2), torch.zeros(2, 2)
    mixture_batch_norm(x, SIZES, running_mean=means, running_var=variances, momentum=1.0)
    for k, part in enumerate(x.double().split(SIZES)):
        torch.testing.assert_close(means[k].double(), part.mean((0, 2)), rtol=1e-7, atol=0)
        torch.testing.assert_close(variances[k].double(), part.var((0, 2)), rtol=1e-3, atol=0)


def test_inputs_are_never_written() -> None:
    leaves = inputs()
    before = [leaf.detach().clone() for leaf in leaves]
    out = mixture_batch_norm(leaves[0], SIZES, *leaves[1:], relu=True)
    firsts = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    torch.autograd.grad(sum(first.square().sum() for first in firsts), leaves)
    assert all(torch.equal(leaf, copy) for leaf, copy in zip(leaves, before, strict=True))

"""The kernels for the CPU against the definition in double precision, and batch norm of each group."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from robplug_advprop import mixture_batch_norm
from robplug_advprop.kernels import numba_folds, ops, reference

CONTIGUOUS, LAST, LAST_3D = torch.contiguous_format, torch.channels_last, torch.channels_last_3d
CASES = [
    ((5, 3, 6, 7), [2, 3], CONTIGUOUS),
    ((5, 3, 6, 7), [2, 3], LAST),
    ((4, 70, 3, 3), [1, 2, 1], CONTIGUOUS),  # more channels than a task has
    ((9, 70, 5, 5), [4, 5], LAST),  # folds of rows, and rows that are left
    ((3, 600, 3, 2), [1, 2], LAST),  # rows that are wide as they are
    ((6, 4, 64, 65), [3, 3], CONTIGUOUS),  # a channel a task
    ((6, 16, 40, 41), [1, 5], LAST),  # several segments and blocks
    ((8, 5), [2, 6], CONTIGUOUS),
    ((8, 600, 1, 1), [2, 6], CONTIGUOUS),
    ((6, 3, 11), [6], CONTIGUOUS),
    ((4, 3, 2, 3, 5), [2, 2], LAST_3D),
]


def split(x: Tensor, sizes: list[int], relu: bool, running: list[Tensor], *rows: Tensor) -> Tensor:
    """Returns what public code makes of a batch."""
    count = len(sizes)
    parts = zip(x.split(sizes), running[:count], running[count:], rows[:count], rows[count:], strict=True)
    out = torch.cat([F.batch_norm(*part, training=True, momentum=0.3) for part in parts])
    return out.relu() if relu else out


def ours(x: Tensor, sizes: list[int], relu: bool, running: list[Tensor], *rows: Tensor) -> Tensor:
    count = len(sizes)
    pairs = rows[:count], rows[count:], running[:count], running[count:]
    return mixture_batch_norm(x, sizes, *pairs, 0.3, relu=relu)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here is one of the reference."""

    def fail(*_: object) -> None:
        raise AssertionError("the reference was called")

    for name in ("mixture_batch_norm", "mixture_batch_norm_backward"):
        monkeypatch.setattr(reference, name, fail)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("shape", "sizes", "layout"), CASES)
def test_results_gradients_and_statistics_are_those_of_double_precision(
    poisoned: None, used: None, shape: tuple[int, ...], sizes: list[int], layout: torch.memory_format, relu: bool
) -> None:
    def laid(tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=layout if tensor.dim() > 1 else CONTIGUOUS)

    count = len(sizes)
    x, g = laid(3 * torch.randn(shape) + 5), laid(torch.randn(shape))
    rows = [torch.randn(shape[1]) for _ in range(2 * count)]
    start = [torch.rand(shape[1]) for _ in range(2 * count)]
    plain = split(x.double(), sizes, False, [row.double() for row in start], *(row.double() for row in rows))
    g = g * (plain.abs() > 1e-4)  # rounding decides at the kink
    found = []
    for call, dtype in ((ours, torch.float32), (split, torch.float32), (split, torch.float64)):
        running = [row.to(dtype, copy=True) for row in start]
        leaves = [laid(tensor.to(dtype)).detach().clone().requires_grad_() for tensor in (x, *rows)]
        out = call(leaves[0], sizes, relu, running, *leaves[1:])
        found.append([out.detach(), *running, *torch.autograd.grad(out, leaves, g.to(dtype))])
    for one, plain, exact in zip(*found, strict=True):
        assert one.stride() == exact.stride()
        allowed = 2 * float((plain - exact).abs().max()) + 1e-6 * float(exact.abs().max())
        assert float((one - exact).abs().max()) <= allowed


@pytest.mark.parametrize("layout", [CONTIGUOUS, LAST])
def test_results_do_not_depend_on_the_number_of_threads(used: None, layout: torch.memory_format) -> None:
    x = torch.randn(8, 48, 24, 24).contiguous(memory_format=layout)
    rows, g, found = [torch.randn(48) for _ in range(4)], torch.randn_like(x), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            running = [torch.zeros(48) for _ in range(4)]
            leaves = [tensor.clone(memory_format=torch.preserve_format).requires_grad_() for tensor in (x, *rows)]
            out = ours(leaves[0], [3, 5], True, running, *leaves[1:])
            found.append([out, *running, *torch.autograd.grad(out, leaves, g)])
        finally:
            torch.set_num_threads(1)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


@pytest.mark.parametrize("layout", [CONTIGUOUS, LAST])
def test_a_mean_far_from_zero_costs_no_digits_of_the_variance(used: None, layout: torch.memory_format) -> None:
    """Squares minus the square of the mean would lose them all; a first sample unlike the rest does no harm either."""
    x = (torch.randn(6, 16, 40, 40) + 4000).contiguous(memory_format=layout)
    x[0] = 0
    variance = torch.zeros(1, 16)
    mixture_batch_norm(x, [6], running_mean=torch.zeros(1, 16), running_var=variance, momentum=1.0)
    exact = x.double().transpose(0, 1).flatten(1).var(dim=1)
    torch.testing.assert_close(variance[0], exact.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", [CONTIGUOUS, LAST])
def test_a_nan_stays_in_its_channel_of_its_group(used: None, layout: torch.memory_format) -> None:
    x = torch.randn(5, 4, 6, 6).contiguous(memory_format=layout)
    x[3, 1, 2, 2] = torch.nan
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = mixture_batch_norm(leaf, [2, 3], relu=True)
    (gradient,) = torch.autograd.grad(out.sum(), leaf)
    for values in (out, gradient):
        wrong = values.isnan()
        assert wrong[2:, 1].all() and int(wrong.sum()) == 3 * 36


def test_what_is_not_kept_or_not_learned_is_left_out(used: None) -> None:
    x, mean = torch.randn(4, 3, 5, 5), torch.zeros(2, 3)
    whole = mixture_batch_norm(x, [1, 3], torch.ones(2, 3), torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3))
    version = mean._version
    out = mixture_batch_norm(x, [1, 3], running_mean=mean, momentum=[torch.tensor(0.5), 0.25])
    assert torch.equal(out, whole) and mean._version > version
    expected = [0.5 * x[:1].mean((0, 2, 3)), 0.25 * x[1:].mean((0, 2, 3))]
    torch.testing.assert_close(mean, torch.stack(expected))


def test_an_upstream_gradient_of_other_strides_is_laid_out(used: None) -> None:
    x = torch.randn(4, 3, 5, 5)
    found = []
    for layout in (CONTIGUOUS, LAST):
        leaf = x.contiguous(memory_format=layout).requires_grad_()
        found += torch.autograd.grad(mixture_batch_norm(leaf, [1, 3], relu=True).square().mean((2, 3)).sum(), leaf)
    torch.testing.assert_close(found[0], found[1])


def test_segments_are_rows_once_each() -> None:
    for size, fold, segments in ((7, 1, 3), (100, 8, 16), (3, 4, 2), (64, 8, 4)):
        parts = [numba_folds.segment(part, 5, size, fold, segments) for part in range(segments)]
        assert [row for begin, end in parts for row in range(begin, end)] == list(range(5, 5 + size))


def test_the_gradient_has_one_of_its_own() -> None:
    x = torch.randn(4, 2, 3, 3).requires_grad_()
    (first,) = torch.autograd.grad(mixture_batch_norm(x, [2, 2]).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), x)
    exact = x.detach().double().requires_grad_()
    (first,) = torch.autograd.grad(mixture_batch_norm(exact, [2, 2]).pow(3).sum(), exact, create_graph=True)
    (expected,) = torch.autograd.grad(first.pow(2).sum(), exact)
    torch.testing.assert_close(second, expected.float(), rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_other_batches_are_left_to_the_reference() -> None:
    x = torch.randn(4, 3, 5, 5)
    assert ops._is_native(x, 2, 1e-5, [0.1, 0.1], ())
    for other in (x.double(), x.half(), x[..., ::2], x.transpose(2, 3), x[:0]):
        assert not ops._is_native(other, 2, 1e-5, [0.1, 0.1], ())


@pytest.mark.parametrize("layout", [CONTIGUOUS, LAST])
def test_a_long_row_is_summed_up_as_exactly_as_by_the_library(used: None, layout: torch.memory_format) -> None:
    x = (torch.randn(2, 1, 1024, 1024) * 0.1 + 100).contiguous(memory_format=layout)
    exact, plain = (F.batch_norm(some, None, None, training=True) for some in (x.double(), x))
    assert (mixture_batch_norm(x, [2]) - exact).abs().max() <= 2 * (plain - exact).abs().max()


def test_the_default_dtype_and_device_change_nothing(used: None) -> None:
    for layout in (CONTIGUOUS, LAST):
        x = torch.randn(4, 3, 5, 5).contiguous(memory_format=layout).requires_grad_()
        expected = mixture_batch_norm(x, [1, 3])
        gradient = torch.autograd.grad(expected.pow(3).sum(), x)[0]
        for dtype, device in ((torch.float64, "cpu"), (torch.bfloat16, "cpu"), (torch.float32, "meta")):
            try:
                torch.set_default_dtype(dtype)
                torch.set_default_device(device)
                out = mixture_batch_norm(x, [1, 3])
                found = torch.autograd.grad(out.pow(3).sum(), x)[0]
            finally:
                torch.set_default_dtype(torch.float32)
                torch.set_default_device(None)
            assert torch.equal(out, expected) and torch.equal(found, gradient)


def test_numbers_of_other_types_are_numbers(used: None) -> None:
    x = torch.randn(4, 3, 5, 5)
    assert torch.equal(mixture_batch_norm(x, list(torch.tensor([1, 3])), eps=1), mixture_batch_norm(x, [1, 3], eps=1.0))
    assert torch.equal(mixture_batch_norm(x, [1, 3], eps=np.float32(0.5)), mixture_batch_norm(x, [1, 3], eps=0.5))


def test_tensors_that_stand_for_something_else_are_left_to_the_reference() -> None:
    x, rows = torch.randn(4, 3, 5, 5), torch.zeros(3)
    negative = torch._neg_view(x)
    torch.testing.assert_close(mixture_batch_norm(negative, [1, 3]), mixture_batch_norm(-x, [1, 3]))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert mixture_batch_norm(x, [1, 3]).shape == x.shape
    gradient = torch.func.grad(lambda value: mixture_batch_norm(value, [1, 3]).pow(3).sum())(x)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(mixture_batch_norm(leaf, [1, 3]).pow(3).sum(), leaf)[0])
    seen: list[Tensor] = []
    torch.func.grad(lambda value: (seen.append(value * 1), value.sum())[1])(x)
    torch.testing.assert_close(mixture_batch_norm(seen[0], [1, 3]), mixture_batch_norm(x, [1, 3]))
    twice = [torch.randn(4, 3, 40, 40), [2, 2], None, None, [rows, rows], None, 0.5]
    mixture_batch_norm(*twice)  # one group after the other
    means = [part.mean((0, 2, 3)) for part in twice[0].split(2)]  # type: ignore[attr-defined]
    torch.testing.assert_close(rows, 0.25 * means[0] + 0.5 * means[1])
    with torch.inference_mode():
        kept = torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match="nference"):
        mixture_batch_norm(x, [1, 3], running_mean=kept)

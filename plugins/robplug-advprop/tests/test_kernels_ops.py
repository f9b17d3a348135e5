"""The operators as PyTorch sees them, what they refuse, and how they are imported."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from robplug.testing.kernels import check_refused
from robplug_advprop import mixture_batch_norm
from robplug_advprop.kernels import reference

X = torch.rand(5, 3, 4, 2)
ROWS = torch.rand(2, 3)
UTILS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("relu", [False, True])
def test_opcheck_forward(relu: bool) -> None:
    operator = torch.ops.robplug_advprop.mixture_batch_norm.default
    leaves = (X.clone().requires_grad_(), ROWS.clone().requires_grad_(), ROWS.clone().requires_grad_())
    torch.library.opcheck(operator, (*leaves, [2, 3], 1e-5, relu), test_utils=UTILS)
    striding = X.to(memory_format=torch.channels_last)
    torch.library.opcheck(operator, (striding, ROWS, ROWS, [2, 3], 1e-5, relu), test_utils=UTILS)


@pytest.mark.parametrize("out", [None, X - 0.5])
def test_opcheck_backward(out: Any) -> None:
    operator = torch.ops.robplug_advprop.mixture_batch_norm_backward.default
    for x in (X, X.to(memory_format=torch.channels_last)):
        args = (torch.randn_like(x), x, ROWS, ROWS, ROWS, out, [2, 3], 1e-5)
        torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: mixture_batch_norm(X.long(), [2, 3]), TypeError, r"got torch.int64; convert it: x.float\(\)"),
        (lambda: mixture_batch_norm(X[:, 0, 0, 0], [5]), ValueError, r"expected x of shape \(N, C, ...\).* got \(5,\)"),
        (lambda: mixture_batch_norm(X[:, :0], [2, 3]), ValueError, r"at least one channel, got \(5, 0, 4, 2\)"),
        (lambda: mixture_batch_norm(X, []), ValueError, r"at least one sample, got sizes \[\]"),
        (lambda: mixture_batch_norm(X, [5, 0]), ValueError, r"got sizes \[5, 0\]; leave empty groups out"),
        (lambda: mixture_batch_norm(X, [2, 2]), ValueError, r"batch of 4 samples, sizes \[2, 2\], got 5; give"),
        (lambda: mixture_batch_norm(X[..., 0, 0], [1, 4]), ValueError, r"at least 2 values a channel.* got sizes \[1"),
        (lambda: mixture_batch_norm(X, [2, 3], ROWS[:1]), ValueError, r"weight of shape \(2, 3\), got \(1, 3\)"),
        (lambda: mixture_batch_norm(X, [2, 3], None, ROWS.T), ValueError, r"bias of shape \(2, 3\), got \(3, 2\)"),
        (lambda: mixture_batch_norm(X, [2, 3], ROWS.to("meta")), ValueError, "weight on cpu, where x is, got meta"),
        (lambda: mixture_batch_norm(X, [2, 3], eps=-1.0), ValueError, "expected a finite eps >= 0, got -1.0"),
    ],
)
def test_bad_input_is_refused_with_value_and_remedy(call: Any, kind: type[Exception], words: str) -> None:
    check_refused(call, kind, words)


def test_statistics_are_no_way_for_a_gradient() -> None:
    _, mean, var = torch.ops.robplug_advprop.mixture_batch_norm(
        X.clone().requires_grad_(), ROWS, ROWS, [2, 3], 0.0, False
    )
    assert not mean.requires_grad and not var.requires_grad


def test_compiled_without_a_graph_break() -> None:
    means, variances = torch.zeros(2, 3), torch.ones(2, 3)

    def run(x: torch.Tensor) -> torch.Tensor:
        return mixture_batch_norm(x * 2, [2, 3], ROWS, ROWS, means, variances, relu=True)

    x = X.clone().requires_grad_()
    expected = run(x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    moved = means.clone()
    means.zero_()
    out = torch.compile(run, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), x)[0], gradient)
    torch.testing.assert_close(means, moved)


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, robplug_advprop, robplug_advprop.plugin; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    ("dtype", "layout"), [(torch.float64, torch.contiguous_format), (torch.bfloat16, torch.channels_last)]
)
def test_what_the_reference_is_called_for_is_the_operator_bit_for_bit(
    relu: bool, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    x = torch.randn(5, 3, 8, 9).to(dtype).contiguous(memory_format=layout)
    exact = reference.accumulator(x)
    weight, bias = torch.rand(2, 3, dtype=exact), torch.randn(2, 3, dtype=exact)
    g = torch.randn(5, 3, 8, 9).to(dtype)
    found = []
    for call in (
        lambda *a: mixture_batch_norm(a[0], [2, 3], a[1], a[2], relu=relu),
        lambda *a: torch.ops.robplug_advprop.mixture_batch_norm(*a, [2, 3], 1e-5, relu)[0],
    ):
        leaves = [tensor.clone(memory_format=torch.preserve_format).requires_grad_() for tensor in (x, weight, bias)]
        out = call(*leaves)
        found.append([out, *torch.autograd.grad(out, leaves, g)])
    for one, other in zip(*found, strict=True):
        assert one.stride() == other.stride() and torch.equal(one, other)

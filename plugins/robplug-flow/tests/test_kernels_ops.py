"""The operators as PyTorch sees them, what they refuse, and how they are imported."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from robplug.testing.kernels import check_refused
from robplug_flow import flow_gradient_penalty, flow_smoothness, warp

X = torch.rand(2, 3, 4, 5)
FLOW = torch.rand(2, 2, 4, 5)

# the last compiles the operator and its backward, and with it those that a backward calls
UTILS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
# with symbolic sizes, the second derivative that is traced along takes most of the time of this file
STATIC = (*UTILS[:3], "test_aot_dispatch_static")
IMAGES, FIELD = (2, 3, 4, 5), (2, 2, 4, 5)


@pytest.mark.parametrize(
    ("name", "shapes", "rest", "utils"),
    [
        ("warp", [IMAGES, FIELD], (), UTILS),
        ("warp_adjoint", [IMAGES, FIELD], (), UTILS[:3]),
        ("warp_flow_gradient", [IMAGES, IMAGES, FIELD], (), UTILS[:3]),
        ("flow_gradient_penalty", [IMAGES, IMAGES], (1.5, 2.0), UTILS),
        ("flow_gradient_penalty_gradient", [(2,), IMAGES, IMAGES], (1.5, 2.0, True), UTILS[:3]),
        ("flow_smoothness", [FIELD], ("diagonal",), STATIC),
        pytest.param("flow_smoothness", [FIELD], ("diagonal",), UTILS, marks=pytest.mark.slow),
    ],
)
def test_opcheck(name: str, shapes: list[tuple[int, ...]], rest: tuple[Any, ...], utils: tuple[str, ...]) -> None:
    operator = getattr(torch.ops.robplug_flow, name).default
    leaves = (torch.randn(shape).requires_grad_() for shape in shapes)
    torch.library.opcheck(operator, (*leaves, *rest), test_utils=utils)
    striding = [torch.randn(shape) for shape in shapes]
    striding = [t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in striding]
    torch.library.opcheck(operator, (*striding, *rest), test_utils=("test_schema", "test_faketensor"))


def test_opcheck_where_the_images_need_no_gradient() -> None:
    operator = torch.ops.robplug_flow.flow_gradient_penalty_gradient.default
    args = (torch.randn(2), torch.randn(IMAGES), torch.randn(IMAGES), 1.0, 1.0, False)
    torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: warp((X * 255).byte(), FLOW), TypeError, r"got torch.uint8; .* x.float\(\) / 255"),
        (lambda: warp(X, FLOW.long()), TypeError, "expected flow of float16.* got torch.int64"),
        (lambda: warp(X.flatten(1), FLOW), ValueError, r"expected x of shape \(N, C, H, W\), got \(2, 60\)"),
        (lambda: warp(X[:, :, :0], FLOW[:, :, :0]), ValueError, r"got \(2, 3, 0, 5\); .* at least one row"),
        (lambda: warp(X, FLOW[:1]), ValueError, r"expected flow of shape \(2, 2, 4, 5\), got \(1, 2, 4, 5\)"),
        (lambda: warp(X, FLOW.permute(0, 2, 3, 1)), ValueError, r"got \(2, 4, 5, 2\)"),
        (lambda: warp(X, FLOW.to("meta")), ValueError, "expected flow on cpu, where x is, got meta; .*to"),
        (lambda: warp(X.to("meta"), FLOW), ValueError, "expected flow on meta, where x is, got cpu"),
        (lambda: flow_gradient_penalty(X, X[:, :1]), ValueError, r"expected g of shape \(2, 3, 4, 5\)"),
        (lambda: flow_gradient_penalty(X, X.half()), ValueError, "expected g of torch.float32.* got torch.float16"),
        (lambda: flow_gradient_penalty(X, X.to("meta")), ValueError, "expected g on cpu"),
        (lambda: flow_gradient_penalty(X.long(), X.long()), TypeError, "got torch.int64"),
        (lambda: flow_gradient_penalty(X, X, -1.0), ValueError, "expected a finite kappa_row >= 0, got -1.0"),
        (lambda: flow_gradient_penalty(X, X, 1.0, float("nan")), ValueError, "kappa_col >= 0, got nan"),
        (lambda: flow_smoothness(X), ValueError, r"expected flow of shape \(N, 2, H, W\), got \(2, 3, 4, 5\)"),
        (lambda: flow_smoothness(FLOW, "four"), ValueError, "expected neighbours 'adjacent' or 'diagonal', got 'four'"),
        (lambda: flow_smoothness(FLOW.int()), TypeError, "got torch.int32"),
    ],
)
def test_bad_input_is_refused_with_value_and_remedy(call: Any, kind: type[Exception], words: str) -> None:
    check_refused(call, kind, words)


def test_nan_is_passed_on() -> None:
    x, g, flow = X.clone(), torch.rand_like(X), FLOW.clone()
    g[0, 0, 1, 1], flow[0, 0, 1, 1] = torch.nan, torch.nan
    assert flow_gradient_penalty(x, g).isnan().tolist() == [True, False]
    assert flow_smoothness(flow).isnan().tolist() == [True, False]


def test_no_empty_batch_is_refused() -> None:
    x, flow = X[:0].requires_grad_(), FLOW[:0].requires_grad_()
    total = warp(x, flow).sum() + flow_gradient_penalty(x, x).sum() + flow_smoothness(flow).sum()
    assert [grad.shape for grad in torch.autograd.grad(total, (x, flow))] == [x.shape, flow.shape]


def test_inputs_are_never_written() -> None:
    x, g, flow = (torch.randn(2, 2, 4, 5).requires_grad_() for _ in range(3))
    before = [tensor.detach().clone() for tensor in (x, g, flow)]
    total = warp(x, flow).square().sum() + flow_gradient_penalty(x, g).sum() + flow_smoothness(flow).sum()
    firsts = torch.autograd.grad(total, (x, g, flow), create_graph=True)
    torch.autograd.grad(sum(first.square().sum() for first in firsts), (x, g, flow))
    assert all(torch.equal(tensor, copy) for tensor, copy in zip((x, g, flow), before, strict=True))


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, robplug_flow, robplug_flow.plugin; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

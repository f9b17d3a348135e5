"""The Triton kernels against the reference: in the interpreter on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from robplug.testing.kernels import check_compiles, check_rounding, laid_out
from robplug_advprop import mixture_batch_norm
from robplug_advprop.kernels import reference

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = ("contiguous", "channels_last", "gaps", "transposed")
EPS = 1e-3


def inputs(
    shape: tuple[int, ...], count: int, layout: str = "contiguous", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns g, x, weight and bias; the mean is large beside the deviation."""
    g, x = (laid_out(tensor.to(dtype), layout).to(DEVICE) for tensor in (torch.randn(shape), torch.randn(shape) + 5))
    rows = torch.randn(2, count, shape[1], dtype=reference.accumulator(x), device=DEVICE)
    return g, x, rows[0], rows[1]


def both(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor], sizes: list[int], relu: bool, **options: Any
) -> list[tuple[Tensor, Tensor]]:
    """Returns the results of Triton beside those of the reference, forward and backward."""
    from robplug_advprop.kernels import triton_impl

    g, x, weight, bias = tensors
    expected = reference.mixture_batch_norm(x, weight, bias, sizes, EPS, relu)
    ours = triton_impl.mixture_batch_norm(x, weight, bias, sizes, EPS, relu, **options)
    out, mean, var = expected
    args = (g, x, weight, mean, var, out if relu else None, sizes, EPS)
    expected += reference.mixture_batch_norm_backward(*args)
    ours += triton_impl.mixture_batch_norm_backward(*args, **options)
    return list(zip(ours, expected, strict=True))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    ("shape", "sizes", "layout", "options"),
    [
        ((7, 3, 5, 4), [3, 4], "contiguous", {"tile": (16, 1), "shares": 2}),
        ((7, 5, 5, 4), [1, 4, 2], "channels_last", {"tile": (16, 4), "shares": 4}),
        ((5, 3, 3, 7), [5], "gaps", {"tile": (64, 1), "shares": 4}),
        ((6, 6, 2, 3), [1, 5], "transposed", {"tile": (8, 2), "shares": 1}),
        ((6, 3, 4, 4), [2, 4], "contiguous", {}),
        ((5, 2, 6, 7), [2, 3], "contiguous", {"tile": (32, 1), "shares": 2}),
        ((6, 40, 2, 2), [2, 4], "channels_last", {"tile": None}),
    ],
)
def test_parity(
    poisoned: None, shape: tuple[int, ...], sizes: list[int], layout: str, options: dict[str, Any], relu: bool
) -> None:
    for ours, expected in both(inputs(shape, len(sizes), layout), sizes, relu, **options):
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-5)
        assert (ours.dtype, ours.stride()) == (expected.dtype, expected.stride())


@pytest.mark.parametrize(
    ("shape", "sizes"), [((2, 1), [2]), ((5, 4), [2, 3]), ((3, 2, 9), [1, 2]), ((4, 2, 1, 2, 2), [2, 2])]
)
def test_parity_in_other_dimensions(poisoned: None, shape: tuple[int, ...], sizes: list[int]) -> None:
    for ours, expected in both(inputs(shape, len(sizes)), sizes, relu=True):
        torch.testing.assert_close(ours, expected, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_rounded_once(dtype: torch.dtype) -> None:
    for ours, expected in both(inputs((7, 3, 5, 4), 2, dtype=dtype), [3, 4], relu=True):
        assert ours.dtype == expected.dtype
        # a number that is no tensor, such as eps, is float32 in a kernel
        close = 1e-7 if ours.dtype == torch.float64 else max(4 * torch.finfo(ours.dtype).eps, 2e-5)
        torch.testing.assert_close(ours, expected, rtol=close, atol=close)


def test_the_variance_does_not_drown_in_the_mean() -> None:
    from robplug_advprop.kernels import triton_impl

    x = (torch.randn(8, 2, 64, dtype=torch.float64) + 1e4).to(torch.float32).to(DEVICE)
    ones = torch.ones(1, 2, device=DEVICE)
    for shares in (1, 4):
        _, mean, var = triton_impl.mixture_batch_norm(x, ones, ones, [8], EPS, False, tile=(32, 1), shares=shares)
        torch.testing.assert_close(var[0].double(), x.double().var((0, 2)), rtol=1e-3, atol=0)
        torch.testing.assert_close(mean[0].double(), x.double().mean((0, 2)), rtol=1e-6, atol=0)


COMPILE = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from robplug_advprop.kernels import triton_impl

CONSTANTS = {"ACC": tl.float32, "ROWS": 64, "COLS": 32, "SHARES": 4, "RELU": True}
POINTERS = {"g", "x", "out", "partial", "weight", "bias", "mean", "var", "mean_out", "var_out"}
POINTERS |= {"grad_x", "grad_weight", "grad_bias"}
names = [name for name in vars(triton_impl) if name.endswith("_kernel")]
assert len(names) == 4, names
for name in names:
    kernel = getattr(triton_impl, name)
    # a stride of 1 is compiled in
    constants = {arg: CONSTANTS.get(arg, 1) for arg in kernel.arg_names if arg in {*CONSTANTS, "x_c"}}
    types = {arg: "*fp32" if arg in POINTERS else "i32" for arg in kernel.arg_names}
    types.update({arg: kind for arg, kind in (("starts", "*i64"), ("eps", "fp32")) if arg in types})
    types.update(dict.fromkeys(constants, "constexpr"))
    source = triton.compiler.ASTSource(kernel, types, constexprs=constants)
    assert "ptx" in triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm, name
"""


def test_the_kernels_compile_without_a_gpu() -> None:
    check_compiles(COMPILE)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(64, 64, 56, 56), (10, 2048, 7, 7), (48, 3, 33, 57)])
def test_operators_on_cuda(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    """Forward and every gradient, through the operators, against float64 on the CPU."""
    sizes = [shape[0] // 4, shape[0] - shape[0] // 4]
    tensors = inputs(shape, 2, layout, dtype)

    def run(g: Tensor, *leaves: Tensor) -> list[Tensor]:
        x, weight, bias = (leaf.detach().requires_grad_() for leaf in leaves)
        out = mixture_batch_norm(x, sizes, weight, bias)
        return [out.detach(), *torch.autograd.grad(out, (x, weight, bias), g)]

    check_rounding(run(*tensors), run(*(tensor.cpu().double() for tensor in tensors)), dtype)

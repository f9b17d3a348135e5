"""The Triton kernels against the reference: in the interpreter on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from robplug.testing.kernels import check_compiles, check_rounding, laid_out
from robplug_di2 import resize_pad
from robplug_di2.kernels import reference

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = ("contiguous", "channels_last", "gaps")
NAMES = ("resize_pad", "resize_pad_adjoint")


def places(count: int, image: tuple[int, int], canvas: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Returns sizes smaller and larger than the image, and offsets of which some leave the canvas."""
    sides = torch.tensor(image)
    size = (torch.rand(count, 2) * 1.5 * sides).long() + 1
    offset = (torch.rand(count, 2) * (torch.tensor(canvas) + 2)).long() - 2
    if count:
        size[-1], offset[-1] = sides, 0
    return size.to(DEVICE), offset.to(DEVICE)


def both(
    name: str, shape: tuple[int, ...], canvas: tuple[int, int], bilinear: bool, block: int, layout: str, dtype: Any
) -> tuple[Tensor, Tensor]:
    """Returns what Triton and the reference make of one random input."""
    from robplug_di2.kernels import triton_impl

    size, offset = places(shape[0], shape[2:], canvas)  # type: ignore[arg-type]
    sides, rest = (canvas, (bilinear, 0.25)) if name == "resize_pad" else (shape[2:], (bilinear,))
    given = shape if name == "resize_pad" else (*shape[:2], *canvas)
    images = laid_out(torch.randn(given).to(dtype), layout).to(DEVICE)
    args = (images, size, offset, *sides, *rest)
    return getattr(triton_impl, name)(*args, block=block), getattr(reference, name)(*args)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bilinear", [False, True])
@pytest.mark.parametrize(
    ("shape", "canvas", "block", "layout"),
    [
        ((2, 2, 5, 7), (6, 9), 16, "contiguous"),
        ((2, 2, 5, 7), (6, 9), 64, "channels_last"),
        ((2, 2, 11, 13), (9, 10), 64, "gaps"),
        ((3, 1, 1, 17), (2, 19), 16, "contiguous"),
        ((1, 1, 1, 1), (1, 1), 8, "contiguous"),
        ((0, 3, 4, 4), (5, 5), 8, "contiguous"),
        ((2, 0, 3, 3), (4, 4), 8, "contiguous"),
    ],
)
def test_parity(
    poisoned: None, name: str, bilinear: bool, shape: tuple[int, ...], canvas: tuple[int, int], block: int, layout: str
) -> None:
    pixels = max(shape[2] * shape[3], canvas[0] * canvas[1])
    assert shape[0] * -(-pixels // block) <= 32
    ours, expected = both(name, shape, canvas, bilinear, block, layout, torch.float32)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert (ours.dtype, ours.stride()) == (expected.dtype, expected.stride())
    if name == "resize_pad" and not bilinear:
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_rounded_once(name: str, dtype: torch.dtype) -> None:
    ours, expected = both(name, (1, 2, 5, 7), (6, 9), True, 64, "contiguous", dtype)
    close = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours, expected, rtol=close, atol=4 * close)


COMPILE = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from robplug_di2.kernels import triton_impl

names = [name for name in vars(triton_impl) if name.endswith("_kernel")]
assert len(names) == 2, names
for name in names:
    for bilinear in (False, True):
        kernel = getattr(triton_impl, name)
        given = {"ACC": tl.float32, "BLOCK": 128, "BILINEAR": bilinear, "height": 1, "x_w": 1, "g_w": 1}
        constants = {arg: given[arg] for arg in kernel.arg_names if arg in given}
        pointers = {"x": "*fp32", "g": "*fp32", "out": "*fp32", "size": "*i64", "offset": "*i64", "fill": "fp32"}
        types = {arg: pointers.get(arg, "i32") for arg in kernel.arg_names}
        types.update(dict.fromkeys(constants, "constexpr"))
        source = triton.compiler.ASTSource(kernel, types, constexprs=constants)
        assert "ptx" in triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm, name
"""


def test_the_kernels_compile_without_a_gpu() -> None:
    check_compiles(COMPILE)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(128, 3, 32, 32), (8, 3, 299, 299), (4, 64, 57, 33), (70_000, 1, 3, 2)])
def test_operator_on_cuda(shape: tuple[int, ...], dtype: torch.dtype, layout: str, mode: Any) -> None:
    """Forward and gradient, through the operator, against float64 on the CPU."""
    canvas = (shape[2] * 11 // 10 + 1, shape[3] * 11 // 10 + 1)
    size, offset = places(shape[0], shape[2:], canvas)  # type: ignore[arg-type]
    x, upstream = laid_out(torch.randn(shape).to(dtype), layout), torch.randn(*shape[:2], *canvas).to(dtype)

    def run(x: Tensor, size: Tensor, offset: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        out = resize_pad(x, size, offset, canvas, mode, 0.25)
        return out.detach(), torch.autograd.grad(out, x, upstream)[0]

    ours = run(x.to(DEVICE), size, offset, upstream.to(DEVICE))
    check_rounding(ours, run(x.double(), size.cpu(), offset.cpu(), upstream.double()), dtype)

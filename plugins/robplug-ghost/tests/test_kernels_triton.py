"""The Triton kernels against the reference: in the interpreter on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from robplug.testing.kernels import check_compiles, check_rounding, laid_out
from robplug_ghost.kernels import ops, reference

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = ("contiguous", "channels_last", "gaps", "transposed")
SEED = 0x9E3779B97F4A7C15 >> 1  # both words of the key count
CASES: dict[str, tuple[int, tuple[Any, ...]]] = {
    "erode_add": (2, (SEED, 3, 0.22, False)),
    "erode_add_backward": (2, (SEED, 3, 0.22)),
    "erode_scale": (1, (SEED, 3, 0.22)),
    "erode_dropout": (1, (SEED, 3, 0.7)),
}
"""Number of tensors and the other arguments."""


def both(name: str, shape: tuple[int, ...], tile: int, layout: str, dtype: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Returns what Triton and the reference make of random inputs; the last one, a ReLU's result, is laid out anew."""
    from robplug_ghost.kernels import triton_impl

    count, rest = CASES[name]
    tensors = [torch.randn(shape).to(dtype).to(DEVICE) for _ in range(count)]
    tensors[-1] = laid_out(tensors[-1].relu() if name == "erode_add_backward" else tensors[-1], layout)
    ours = getattr(triton_impl, name)(*tensors, *rest, tile=tile)
    expected = getattr(reference, name)(*tensors, *rest)
    return [ours] if isinstance(ours, Tensor) else [*ours], [expected] if isinstance(expected, Tensor) else [*expected]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("shape", "tile", "layout"),
    [
        ((3, 5, 3, 7), 64, "contiguous"),
        ((3, 5, 3, 7), 128, "channels_last"),
        ((2, 9, 5, 5), 128, "gaps"),
        ((2, 3, 5, 4), 64, "transposed"),
        ((2, 17, 1, 1), 16, "contiguous"),
        ((0, 3, 4, 4), 16, "contiguous"),
        ((2, 0, 3, 3), 16, "contiguous"),
        ((2, 3, 0, 3), 16, "contiguous"),
    ],
)
def test_parity(poisoned: None, name: str, shape: tuple[int, ...], tile: int, layout: str) -> None:
    for ours, expected in zip(*both(name, shape, tile, layout, torch.float32), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
        assert (ours.dtype, ours.stride()) == (expected.dtype, expected.stride())


@pytest.mark.parametrize("shape", [(3, 40), (2, 5, 11), (1, 3, 2, 3, 5)])
@pytest.mark.parametrize("name", CASES)
def test_any_number_of_axes(poisoned: None, name: str, shape: tuple[int, ...]) -> None:
    for ours, expected in zip(*both(name, shape, 64, "contiguous", torch.float32), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_rounded_once(poisoned: None, name: str, dtype: torch.dtype) -> None:
    close = torch.finfo(dtype).eps
    for ours, expected in zip(*both(name, (2, 5, 3, 7), 64, "channels_last", dtype), strict=True):
        torch.testing.assert_close(ours, expected, rtol=close, atol=close)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_random_numbers_are_equal_bit_for_bit(layout: str) -> None:
    """Of ones, an erosion leaves its weights and its mask; float64 shows every bit of a float32 weight."""
    from robplug_ghost.kernels import triton_impl

    ones = laid_out(torch.ones(1, 300, 3, 2, dtype=torch.float64), layout).to(DEVICE)
    for skip in (0.22, 1.0, 1e-3):
        weights = triton_impl.erode_scale(ones, SEED, 7, skip, tile=4096)[0, :, 0, 0].cpu()
        assert torch.equal(weights, reference.channel_weights(SEED, 7, 300, skip).double())
    for keep in (0.3, 0.994, 1.0):
        mask = triton_impl.erode_dropout(ones, SEED, 7, keep, tile=4096)[0].cpu() != 0
        assert torch.equal(mask.flatten(1), reference.kept(SEED, 7, 300, 6, keep, torch.device("cpu")))


def test_relu_keeps_a_nan_and_cuts_its_gradient_where_the_sum_is_cut() -> None:
    from robplug_ghost.kernels import triton_impl

    shortcut, residual = torch.tensor([[[1.0, -2.0, torch.nan, 0.0]]]).to(DEVICE), torch.zeros(1, 1, 4).to(DEVICE)
    ours = triton_impl.erode_add(shortcut, residual, SEED, 0, 0.22, True)
    torch.testing.assert_close(ours, reference.erode_add(shortcut, residual, SEED, 0, 0.22, True), equal_nan=True)
    assert ours[0, 0, 1] == 0 and ours[0, 0, 2].isnan()


COMPILE = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from robplug_ghost.kernels import triton_impl

CONSTANTS = {"ACC": tl.float32, "WIDTH": 0.22, "LIMIT": 2**23, "SCALE": 2.0, "RELU": True}
POINTERS = {"shortcut", "residual", "x", "g", "out", "grad_shortcut", "grad_residual"}
names = [name for name in vars(triton_impl) if name.endswith("_kernel")]
assert len(names) == 4, names
for name in names:
    # the compiler is handed a stride of 1 as a constant: that of the channels, if they are last
    for cols, rows, one in ((1, 1024, "p"), (64, 16, "c"))[: 2 if "dropout" in name else 1]:
        kernel = getattr(triton_impl, name)
        given = {**CONSTANTS, "COLS": cols, "ROWS": rows}
        constants = {arg: given.get(arg, 1) for arg in kernel.arg_names if arg in given or arg[1:] == f"_{one}"}
        types = {arg: "*fp32" if arg in POINTERS else "i32" for arg in kernel.arg_names}
        types["seed"] = "i64"
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
@pytest.mark.parametrize("shape", [(64, 256, 56, 56), (10, 2048, 7, 7), (48, 3, 33, 57), (70_000, 3, 2, 2)])
def test_operators_on_cuda(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    """Forward and gradients, through the operators, against float64 on the CPU; masks are the same."""
    shortcut, residual, g = (laid_out(torch.randn(shape).to(dtype), layout) for _ in range(3))

    def run(*tensors: Tensor) -> list[Tensor]:
        s, r, upstream = tensors[0].detach().requires_grad_(), tensors[1].detach().requires_grad_(), tensors[2]
        plain = ops.erode_add(s, r, SEED, 1, 0.22)
        dropped = ops.erode_dropout(s, SEED, 1, 0.9)
        grads = torch.autograd.grad([plain, dropped], [s, r], [upstream, upstream])
        return [plain.detach(), dropped.detach(), *grads]

    ours = run(*(tensor.to(DEVICE) for tensor in (shortcut, residual, g)))
    expected = run(*(tensor.double() for tensor in (shortcut, residual, g)))
    check_rounding(ours, expected, dtype, units=8)
    assert torch.equal(ours[1].cpu() == 0, expected[1] == 0)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_relu_on_cuda(layout: str) -> None:
    shortcut, residual = (laid_out(torch.randn(8, 64, 28, 28), layout) for _ in range(2))

    def run(s: Tensor, r: Tensor) -> list[Tensor]:
        s, r = s.detach().requires_grad_(), r.detach().requires_grad_()
        out = ops.erode_add(s, r, SEED, 1, 0.22, "relu")
        return [out.detach(), *torch.autograd.grad(out.square().sum(), (s, r))]

    for one, other in zip(run(shortcut.cuda(), residual.cuda()), run(shortcut, residual), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-5, atol=1e-5)

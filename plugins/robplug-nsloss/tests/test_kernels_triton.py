"""The Triton kernels against the reference: in the interpreter on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from robplug.testing.kernels import check_compiles, check_rounding, laid_out
from robplug_nsloss.kernels import reference
from robplug_nsloss.kernels.ops import accumulate_signs, mean_abs_difference, sphere_noise
from robplug_nsloss.kernels.surrogate import sign_surrogate

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAUNCHES = ((16, "contiguous"), (64, "channels_last"), (16, "gaps"), (64, "transposed"))
LAYOUTS = ("contiguous", "channels_last", "gaps", "transposed")
SHAPES = ((2, 3, 5, 7), (3, 11), (1,), (2, 2, 4, 4), (5, 2, 3))  # at most 32 blocks of 16 or 64 values


def layers(layout: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Returns activations of two passes; the noisy ones of four axes are laid out anew."""
    clean = [torch.randn(shape).relu().to(dtype).to(DEVICE) for shape in SHAPES]
    noisy = [(layer + torch.randn_like(layer)).relu() for layer in clean]
    return clean, [laid_out(layer, layout) if layer.dim() == 4 else layer for layer in noisy]


def check_same(ours: Any, expected: Any, close: float = 1e-6) -> None:
    """Values, dtypes and strides are those of the reference."""
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=close, atol=close)
        assert (one.dtype, one.stride()) == (other.dtype, other.stride())


@pytest.mark.parametrize(("block", "layout"), LAUNCHES)
def test_differences(poisoned: None, block: int, layout: str) -> None:
    from robplug_nsloss.kernels import triton_impl

    clean, noisy = layers(layout, torch.float32)
    ours = triton_impl.mean_abs_difference(clean, noisy, block=block)
    check_same([ours], [reference.mean_abs_difference(clean, noisy)])
    g = torch.tensor(0.7, device=DEVICE)
    for both in (False, True):
        args = (g, clean, noisy, both)
        ours = triton_impl.mean_abs_difference_backward(*args, block=block)
        check_same(ours, reference.mean_abs_difference_backward(*args))


@pytest.mark.parametrize(("block", "layout"), LAUNCHES)
def test_sums_of_signs(poisoned: None, block: int, layout: str) -> None:
    """Sums have strides of their own."""
    from robplug_nsloss.kernels import triton_impl

    clean, _ = layers(layout, torch.float32)
    ours, expected = ([torch.full_like(layer, 99, dtype=torch.int8) for layer in clean] for _ in range(2))
    ours[0] = ours[0].mT.contiguous().mT
    for draw in range(2):
        _, noisy = layers(layout, torch.float32)
        means, signs = triton_impl.accumulate_signs(clean, noisy, ours, draw, block=block)
        expected_means, expected_signs = reference.accumulate_signs(clean, noisy, expected, draw)
        check_same([means, *signs], [expected_means, *expected_signs])
        assert all(torch.equal(one, other) for one, other in zip(ours, expected, strict=True))


@pytest.mark.parametrize(("block", "layout"), LAUNCHES)
def test_adding_signs(poisoned: None, block: int, layout: str) -> None:
    from robplug_nsloss.kernels import triton_impl

    g, weight = laid_out(torch.randn(2, 3, 5, 7, device=DEVICE), layout), torch.tensor(0.7, device=DEVICE)
    signs = torch.randint(-3, 4, g.shape, dtype=torch.int8, device=DEVICE)
    for laid in (signs, signs.mT.contiguous().mT):
        ours = triton_impl.add_signs(g, laid, weight, block=block)
        check_same([ours], [reference.add_signs(g, laid, weight)])


@pytest.mark.parametrize("whole", [0, 1024])
@pytest.mark.parametrize(("block", "layout"), LAUNCHES)
def test_sphere_noise(poisoned: None, whole: int, block: int, layout: str) -> None:
    """In one pass and in two; a sample without noise stays."""
    from robplug_nsloss.kernels import triton_impl

    x, noise = laid_out(torch.randn(4, 3, 5, 7, device=DEVICE), layout), torch.randn(4, 3, 5, 7, device=DEVICE)
    noise[3] = 0
    for draws in (noise, laid_out(noise, "transposed"), noise.double(), noise.half()):
        ours = triton_impl.sphere_noise(x, draws, 0.3, block=block, whole=whole)
        check_same([ours], [reference.sphere_noise(x, draws, 0.3)])
        assert torch.equal(ours[3], x[3])


@pytest.mark.parametrize("whole", [0, 1024])
def test_noise_of_interleaved_samples_and_of_none(poisoned: None, whole: int) -> None:
    from robplug_nsloss.kernels import triton_impl

    for x in (torch.randn(7, 3, device=DEVICE).mT, torch.randn(0, 5, device=DEVICE), torch.randn(5, 0, device=DEVICE)):
        noise = torch.randn(x.shape, device=DEVICE)
        ours = triton_impl.sphere_noise(x, noise, 0.3, block=4, whole=whole)
        check_same([ours], [reference.sphere_noise(x, noise, 0.3)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_rounded_once(poisoned: None, dtype: torch.dtype) -> None:
    """Kernel and reference compute in float32, or in float64 for float64; two dtypes are two launches."""
    from robplug_nsloss.kernels import triton_impl

    close, weight = torch.finfo(dtype).eps, torch.tensor(0.7, device=DEVICE)
    clean, noisy = layers("channels_last", dtype)
    clean[1], noisy[1] = clean[1].float(), noisy[1].float()
    ours, expected = ([torch.empty_like(layer, dtype=torch.int8) for layer in clean] for _ in range(2))
    means, signs = triton_impl.accumulate_signs(clean, noisy, ours, 0, block=64)
    expected_means, expected_signs = reference.accumulate_signs(clean, noisy, expected, 0)
    check_same([means], [expected_means])
    check_same([*signs, *ours], [*expected_signs, *expected])
    args = (weight, clean, noisy, True)
    found = triton_impl.mean_abs_difference_backward(*args, block=64)
    check_same(found, reference.mean_abs_difference_backward(*args), close)
    check_same(
        [triton_impl.add_signs(noisy[0], signs[0], weight, block=64)],
        [reference.add_signs(noisy[0], signs[0], weight)],
        close,
    )
    for whole in (0, 1024):
        moved = triton_impl.sphere_noise(noisy[0], clean[0], 0.3, block=64, whole=whole)
        check_same([moved], [reference.sphere_noise(noisy[0], clean[0], 0.3)], close)


def test_a_nan_stays_in_its_layer() -> None:
    from robplug_nsloss.kernels import triton_impl

    clean, noisy = layers("contiguous", torch.float32)
    noisy[1][2, 3] = torch.nan
    sums = [torch.zeros_like(layer, dtype=torch.int8) for layer in clean]
    means, signs = triton_impl.accumulate_signs(clean, noisy, sums, 1, block=64)
    assert means.isnan().tolist() == [False, True, False, False, False]
    assert signs[1][2, 3] == sums[1][2, 3] == 0


COMPILE = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from robplug_nsloss.kernels import triton_impl

CONSTANTS = {"ACC": tl.float32, "RADIUS": 0.3, "BLOCK": 1024, "STEP": 1024, "COLUMNS": 7, "LAYERS": 32}
CONSTANTS |= dict.fromkeys(("ADD", "WRITE", "BOTH"), True)
TYPES = {"table": "*i64", "signs": "*i8", "layers": "i32", "size": "i32", "parts": "i32"}
names = [name for name in vars(triton_impl) if name.endswith("_kernel")]
assert len(names) == 7, names
for name in names:
    kernel = getattr(triton_impl, name)
    constants = {arg: CONSTANTS[arg] for arg in kernel.arg_names if arg in CONSTANTS}
    types = {arg: TYPES.get(arg, "*fp16") for arg in kernel.arg_names}
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
@pytest.mark.parametrize("shape", [(128, 16, 32, 32), (32, 512, 2, 2), (2, 3, 1033, 517), (70_000, 3, 2, 2)])
def test_operators_on_cuda(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    """Forward and every gradient, through the operators, against float64 on the CPU."""
    x, noise, other = (laid_out(torch.randn(shape).to(dtype), layout) for _ in range(3))

    def run(x: Tensor, noise: Tensor, other: Tensor) -> list[Tensor]:
        leaf, clean = x.detach().requires_grad_(), other.detach().requires_grad_()
        moved = sphere_noise(leaf, noise, 3.0)
        # of more than rounding's size, else rounding decides about signs
        ours = [leaf * 1, torch.where((leaf - clean).abs() > 0.1, leaf, clean).flatten(1)]
        theirs = [clean, clean.flatten(1)]
        sums = [torch.empty_like(layer, dtype=torch.int8) for layer in ours]
        means = accumulate_signs(theirs, ours, sums, 0)
        size = leaf.numel()  # else float16 has no such numbers
        values = [mean_abs_difference(theirs, ours), means.sum(), -sign_surrogate(theirs, sums).sum()]
        grads = [torch.autograd.grad(value * size, [leaf, clean], allow_unused=True) for value in values]
        found = [moved, *values[:2], means, *(grad for pair in grads for grad in pair if grad is not None)]
        return [tensor.detach() for tensor in found]

    check_rounding(
        run(*(tensor.to(DEVICE) for tensor in (x, noise, other))),
        run(x.double(), noise.double(), other.double()),
        dtype,
    )

"""The Triton kernels against the reference: in the interpreter on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from robplug.testing.kernels import check_compiles, check_rounding, laid_out
from robplug_dag.kernels import ops, reference

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LAYOUTS = ("contiguous", "channels_last", "gaps", "transposed")


def scene(shape: tuple[int, ...], layout: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Returns logits of whole numbers, so that many tie, labels and goals, some of which are no classes."""
    logits = torch.randint(-3, 3, shape).to(dtype).to(DEVICE)
    if len(shape) == 4:
        logits = laid_out(logits, layout)
    elif layout == "transposed":
        logits = logits.mT.contiguous().mT
    rest = list(shape)
    classes = rest.pop(1 if len(shape) == 4 else 2)
    labels, goals = (torch.randint(-1, classes + 1, rest).to(DEVICE) for _ in range(2))
    return logits, labels, goals


def check_parity(logits: Tensor, labels: Tensor, goals: Tensor, until_goal: bool, tile: int) -> None:
    from robplug_dag.kernels import triton_impl

    ours = triton_impl.dense_adversary_grad(logits, labels, goals, until_goal, tile=tile)
    expected = reference.dense_adversary_grad(logits, labels, goals, until_goal)
    for one, other in zip(ours, expected, strict=True):
        assert torch.equal(one, other) and (one.dtype, one.stride()) == (other.dtype, other.stride())


@pytest.mark.parametrize("until_goal", [False, True])
@pytest.mark.parametrize(
    ("shape", "tile", "layout"),
    [
        ((3, 5, 3, 7), 16, "contiguous"),
        ((3, 5, 3, 7), 64, "channels_last"),
        ((2, 9, 5, 5), 64, "gaps"),
        ((2, 3, 5, 4), 16, "transposed"),
        ((2, 2, 1, 1), 16, "contiguous"),
        ((2, 37, 11), 64, "contiguous"),
        ((2, 13, 37), 16, "contiguous"),  # classes do not fit into a tile
        ((2, 6, 11), 16, "transposed"),
        ((0, 3, 4, 4), 16, "contiguous"),
        ((2, 3, 0, 3), 16, "contiguous"),
        ((2, 0, 3), 16, "contiguous"),
    ],
)
def test_the_dense_gradient_is_the_reference(
    poisoned: None, shape: tuple[int, ...], tile: int, layout: str, until_goal: bool
) -> None:
    check_parity(*scene(shape, layout), until_goal, tile)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dense_gradient_in_all_dtypes(poisoned: None, dtype: torch.dtype) -> None:
    check_parity(*scene((2, 5, 3, 7), "channels_last", dtype), False, 64)


@pytest.mark.parametrize("until_goal", [False, True])
def test_infinite_and_unknown_logits(poisoned: None, until_goal: bool) -> None:
    """A NaN marks its image, -1, if it is a target's; the other images keep their numbers."""
    logits, labels, goals = scene((5, 3, 2, 5), "contiguous")
    labels[:], goals[:] = 2, 1
    labels[2, 0, 3] = -1
    logits[0, 0, 0, 0] = torch.nan
    logits[1, :, 0, 0] = -torch.inf
    logits[2, 0, 0, 3] = torch.nan
    logits[3, 2, 1, 4] = torch.nan
    logits[4, 2, 1, 4] = torch.inf
    check_parity(logits, labels, goals, until_goal, 16)
    counts = reference.dense_adversary_grad(logits, labels, goals, until_goal)[1]
    assert (counts < 0).tolist() == [True, False, False, True, False]


def steps(shape: tuple[int, ...], layout: str, dtype: torch.dtype, tile: int) -> tuple[list[Tensor], list[Tensor]]:
    """Returns what Triton and the reference make of random inputs; the first image's gradient is 0."""
    from robplug_dag.kernels import triton_impl

    gradient, r, x = torch.randn(shape), torch.randn(shape).mul_(0.3), torch.rand(shape)
    gradient[:1] = 0
    gradient, x = gradient.to(DEVICE, dtype), x.to(DEVICE, dtype)
    r = r.to(DEVICE, reference.accumulator(x))
    if len(shape) == 4:
        x = laid_out(x, layout)
    args = (gradient, r, x, 0.05, 0.0, 1.0)
    return [*triton_impl.normalised_step(*args, tile=tile)], [*reference.normalised_step(*args)]


@pytest.mark.parametrize(
    ("shape", "tile", "layout"),
    [
        ((3, 5, 3, 7), 16, "contiguous"),
        ((3, 5, 3, 7), 64, "channels_last"),
        ((2, 9, 5, 5), 64, "gaps"),
        ((2, 3, 5, 4), 16, "transposed"),
        ((2, 37), 16, "contiguous"),
        ((1, 3, 2, 3, 5), 64, "contiguous"),
        ((0, 3, 4, 4), 16, "contiguous"),
        ((2, 3, 0, 3), 16, "contiguous"),
    ],
)
def test_the_step_is_the_reference(poisoned: None, shape: tuple[int, ...], tile: int, layout: str) -> None:
    for ours, expected in zip(*steps(shape, layout, torch.float32, tile), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)
        assert (ours.dtype, ours.stride()) == (expected.dtype, expected.stride())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_step_in_other_dtypes_is_rounded_once(poisoned: None, dtype: torch.dtype) -> None:
    (r, image, size), (r_, image_, size_) = steps((3, 5, 3, 7), "contiguous", dtype, 64)
    close = 1e-6 if dtype != torch.float64 else 1e-14
    torch.testing.assert_close(r, r_, rtol=close, atol=close)
    torch.testing.assert_close(image, image_, rtol=torch.finfo(dtype).eps, atol=0)
    assert torch.equal(size, size_)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's numpy divides by infinity
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_the_step_shows_a_gradient_that_is_not_finite(poisoned: None, wrong: float) -> None:
    from robplug_dag.kernels import triton_impl

    gradient, zero = torch.randn(3, 2, 5, 5), torch.zeros(3, 2, 5, 5)
    gradient[1, 1, 4, 4] = wrong
    args = [tensor.to(DEVICE) for tensor in (gradient, zero, zero)]
    size = triton_impl.normalised_step(*args, 0.1, 0.0, 1.0, tile=16)[2]
    torch.testing.assert_close(size, reference.normalised_step(*args, 0.1, 0.0, 1.0)[2], equal_nan=True)
    assert size.isfinite().tolist() == [True, False, True]


def test_tiny_and_huge_gradients_make_whole_steps(poisoned: None) -> None:
    from robplug_dag.kernels import triton_impl

    gradient = torch.tensor([[1e-42, -5e-43], [3e38, -1.5e38]], device=DEVICE)
    zero = torch.zeros_like(gradient)
    r = triton_impl.normalised_step(gradient, zero, zero, 0.5, -1.0, 1.0, tile=16)[0]
    torch.testing.assert_close(r.cpu(), torch.tensor([[0.5, -0.25], [0.5, -0.25]]), rtol=1e-3, atol=0)


COMPILE = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from robplug_dag.kernels import triton_impl

POINTERS = {"logits": "fp32", "labels": "i64", "goals": "i64", "out": "fp32", "gradient": "fp32", "r": "fp32",
            "x": "fp32", "size": "fp32", "moved": "fp32", "image": "fp32"}
names = [name for name in vars(triton_impl) if name.endswith("_kernel")]
assert len(names) == 3, names
for name in names:
    kernel = getattr(triton_impl, name)
    # the compiler is handed a stride of 1 as a constant: that of the targets, or of the classes
    for cols, rows, one in ((4, 256, "t"), (128, 8, "c"))[: 2 if "dense" in name else 1]:
        given = {"ACC": tl.float32, "COLS": cols, "ROWS": rows, "BLOCK": 1024, "UNTIL_GOAL": cols == 4,
                 "GAMMA": 0.002, "LOW": 0.0, "HIGH": 1.0}
        constants = {arg: given.get(arg, 1) for arg in kernel.arg_names if arg in given or arg[1:] == f"_{one}"}
        pointers = {**POINTERS, "found": "i64" if "dense" in name else "fp32"}
        types = {arg: f"*{pointers[arg]}" if arg in pointers else "i32" for arg in kernel.arg_names}
        types.update(dict.fromkeys(constants, "constexpr"))
        source = triton.compiler.ASTSource(kernel, types, constexprs=constants)
        assert "ptx" in triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm, name
"""


def test_the_kernels_compile_without_a_gpu() -> None:
    check_compiles(COMPILE)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 21, 512, 512), (3, 150, 33, 57), (8, 1000, 91), (2, 3000, 1204)])
def test_operators_on_cuda(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    """Both operators against the reference on the CPU: gradient and numbers are equal, a step is rounded once."""
    if len(shape) == 3 and layout != "contiguous":
        layout = "transposed"
    logits, labels, goals = scene(shape, layout, dtype)
    for rule in ("label", "goal"):
        ours = ops.dense_adversary_grad(logits, labels, goals, rule)
        expected = ops.dense_adversary_grad(logits.cpu(), labels.cpu(), goals.cpu(), rule)
        assert all(torch.equal(one.cpu(), other) for one, other in zip(ours, expected, strict=True))
    gradient, x = (torch.randn(4, 3, 65, 33).to(DEVICE, dtype) for _ in range(2))
    x = laid_out(x, layout)
    r = torch.zeros_like(x, dtype=reference.accumulator(x))
    found = ops.normalised_step(gradient, r, x, 0.1, -2.0, 2.0)
    truth = ops.normalised_step(gradient.cpu().double(), r.cpu().double(), x.cpu().double(), 0.1, -2.0, 2.0)
    check_rounding(found, truth, dtype, units=2)

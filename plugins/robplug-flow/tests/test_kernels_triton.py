"""The Triton kernels against the reference: in the interpreter on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from robplug.testing.kernels import check_compiles, check_rounding, laid_out
from robplug_flow import flow_gradient_penalty, flow_smoothness, warp
from robplug_flow.kernels import reference

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = ("contiguous", "channels_last", "gaps")
CALLS: dict[str, Callable[[dict[str, Tensor]], tuple[Any, ...]]] = {
    "warp": lambda t: (t["x"], t["flow"]),
    "warp_adjoint": lambda t: (t["g"], t["flow"]),
    "warp_flow_gradient": lambda t: (t["g"], t["x"], t["flow"]),
    "flow_gradient_penalty": lambda t: (t["x"], t["g"], 1.5, 0.5),
    "flow_gradient_penalty_gradient": lambda t: (t["u"], t["x"], t["g"], 1.5, 0.5, True),
    "flow_smoothness": lambda t: (t["flow"], "adjacent"),
}


def inputs(shape: tuple[int, ...], layout: str = "contiguous", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Returns x in the layout and g and flow in the next ones, so that no two have the same strides."""
    layouts = dict(zip(("x", "g", "flow"), LAYOUTS[LAYOUTS.index(layout) :] + LAYOUTS, strict=False))
    flow = torch.randn(shape[0], 2, *shape[2:]) * 2
    flow[torch.rand_like(flow) < 0.2] = 0  # some pixels on the kink
    tensors = {"x": torch.randn(shape), "g": torch.randn(shape), "flow": flow, "u": torch.randn(shape[0])}
    return {
        name: (laid_out(tensor.to(dtype), layouts[name]) if name in layouts else tensor).to(DEVICE)
        for name, tensor in tensors.items()
    }


def outputs(module: Any, name: str, args: tuple[Any, ...], **options: int) -> tuple[Tensor, ...]:
    out = getattr(module, name)(*args, **options)
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("shape", "block", "layout"),
    [
        ((2, 3, 5, 7), 32, "channels_last"),
        ((2, 2, 6, 5), 32, "gaps"),
        ((1, 2, 1, 9), 8, "contiguous"),
    ],
)
def test_parity(poisoned: None, name: str, shape: tuple[int, ...], block: int, layout: str) -> None:
    from robplug_flow.kernels import triton_impl

    assert shape[0] * -(-shape[2] * shape[3] // block) <= 32
    args = CALLS[name](inputs(shape, layout))
    for ours, expected in zip(
        outputs(triton_impl, name, args, block=block), outputs(reference, name, args), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
        assert (ours.dtype, ours.stride()) == (expected.dtype, expected.stride())


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (0, 3, 4, 4), (1, 0, 3, 3)])
def test_parity_on_what_is_small_or_empty(poisoned: None, name: str, shape: tuple[int, ...]) -> None:
    from robplug_flow.kernels import triton_impl

    args = CALLS[name](inputs(shape))
    for ours, expected in zip(outputs(triton_impl, name, args), outputs(reference, name, args), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_parity_of_the_options(poisoned: None) -> None:
    from robplug_flow.kernels import triton_impl

    tensors = inputs((2, 3, 5, 7))
    ours, expected = (module.flow_smoothness(tensors["flow"], "diagonal") for module in (triton_impl, reference))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    args = (tensors["u"], tensors["x"], tensors["g"], 1.5, 0.5, False)
    (none, ours), (_, expected) = (module.flow_gradient_penalty_gradient(*args) for module in (triton_impl, reference))
    assert none.numel() == 0
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_rounded_once(name: str, dtype: torch.dtype) -> None:
    """Kernel and reference compute in float32, so that they differ by one rounding of the result at most."""
    from robplug_flow.kernels import triton_impl

    tensors = inputs((1, 2, 15, 7), dtype=dtype)
    if dtype == torch.float64:
        tensors["u"] = tensors["u"].double()
    args = CALLS[name](tensors)
    for ours, expected in zip(outputs(triton_impl, name, args), outputs(reference, name, args), strict=True):
        assert ours.dtype == expected.dtype
        # in float64 the 1e-8 under the root of the smoothness is a float32 constant
        close = 1e-7 if ours.dtype == torch.float64 else 4 * torch.finfo(ours.dtype).eps
        torch.testing.assert_close(ours, expected, rtol=close, atol=4 * close)


def test_zero_and_integer_flows_on_triton() -> None:
    from robplug_flow.kernels import triton_impl

    x = torch.randn(1, 2, 6, 7, device=DEVICE)
    flow = torch.zeros(1, 2, 6, 7, device=DEVICE)
    assert torch.equal(triton_impl.warp(x, flow), x)
    slope = triton_impl.warp_flow_gradient(torch.ones_like(x), x, flow)
    expected = torch.zeros_like(slope)
    expected[:, 0, :-1] = (x[:, :, 1:] - x[:, :, :-1]).sum(1)
    expected[:, 1, :, :-1] = (x[:, :, :, 1:] - x[:, :, :, :-1]).sum(1)
    assert torch.equal(slope, expected)
    flow[:, 0], flow[:, 1] = 2, -3
    rows, cols = torch.arange(6).add(2).clamp(max=5), torch.arange(7).sub(3).clamp(min=0)
    assert torch.equal(triton_impl.warp(x, flow), x[:, :, rows][:, :, :, cols])
    flow[0, 0, 0, 0], flow[0, 0, 1, 1] = torch.nan, torch.inf
    out = triton_impl.warp(x, flow)
    assert out.isnan().nonzero()[:, 1:].tolist() == [[0, 0, 0], [1, 0, 0]]
    assert torch.equal(out[0, :, 1, 1], x[0, :, 5, 0])


def test_the_atomic_adjoint_refuses_deterministic_mode() -> None:
    from robplug_flow.kernels import triton_impl

    tensors = inputs((1, 1, 2, 2))
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match=r"atomic additions.*warn_only=True"):
            triton_impl.warp_adjoint(tensors["g"], tensors["flow"])
    finally:
        torch.use_deterministic_algorithms(False)


COMPILE = """
import sys, types

# the kernels' module only names it in annotations, and importing it would take most of the time
sys.modules["torch"] = types.SimpleNamespace(Tensor=None)

import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from robplug_flow.kernels import triton_impl

CONSTANTS = {"ACC": tl.float32, "BLOCK": 128, "NEED_X": True, "DIAGONAL": True, "SOFTENING": 1e-8}
names = [name for name in vars(triton_impl) if name.endswith("_kernel")]
assert len(names) == 6, names
for name in names:
    kernel = getattr(triton_impl, name)
    pointers = {"x", "g", "flow", "out", "partial", "scale", "grad_x", "grad_g", "gradient"}
    # a size or stride of 1 is compiled in, as for an image of one row
    constants = {arg: CONSTANTS.get(arg, 1) for arg in kernel.arg_names if arg in {*CONSTANTS, "height", "x_w", "f_w"}}
    types = {arg: "*fp32" if arg in pointers else "i32" for arg in kernel.arg_names}
    types.update(dict.fromkeys(constants, "constexpr"))
    source = triton.compiler.ASTSource(kernel, types, constants)
    assert "ptx" in triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm, name
"""


def test_the_kernels_compile_without_a_gpu() -> None:
    check_compiles(COMPILE)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(128, 3, 32, 32), (2, 3, 2048, 2048), (4, 64, 57, 33), (70_000, 1, 3, 2)])
def test_operators_on_cuda(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    """Forward and every gradient, through the operators, against float64 on the CPU."""
    tensors = {name: tensor for name, tensor in inputs(shape, layout, dtype).items() if name != "u"}
    truth = {name: tensor.cpu().double() for name, tensor in tensors.items()}

    def run(t: dict[str, Tensor]) -> list[Tensor]:
        x, g, flow = (t[name].detach().requires_grad_() for name in ("x", "g", "flow"))
        torch.manual_seed(1)
        found = []
        for out, leaves in (
            (warp(x, flow), (x, flow)),
            (flow_gradient_penalty(x, g), (x, g)),
            (flow_smoothness(flow), (flow,)),
        ):
            upstream = torch.randn(out.shape).to(out)
            found += [out.detach(), *torch.autograd.grad(out, leaves, upstream)]
        return found

    check_rounding(run(tensors), run(truth), dtype)

"""What the tests of a plugin's kernels share: fixtures of pytest, tensors with other strides, and checks.

Fixtures work in the tests beside a ``conftest.py`` that imports them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from robplug.testing.trials import require


def interpret_without_gpu() -> None:
    """Has Triton's interpreter run the kernels where there is no GPU; to be called before a test imports a kernel."""
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Tests that draw their own inputs draw the same ones each time."""
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fills uninitialised memory with NaN, so that a cell that nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """Returns the tensor with other strides; what lies between its values is NaN.

    Args:
        tensor: (N, C, H, W).
        layout: ``"contiguous"``, ``"channels_last"``, ``"gaps"`` or ``"transposed"``, whose columns are contiguous.
    """
    if layout == "gaps":
        n, channels, height, width = tensor.shape
        wide = tensor.new_full((n, 2 * channels, height + 1, 2 * width), torch.nan)
        return wide[:, ::2, 1:, ::2].copy_(tensor)
    if layout == "transposed":
        return tensor.mT.contiguous().mT
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    return tensor.contiguous(memory_format=formats[layout])


def check_refused(call: Callable[[], Any], kind: type[Exception], words: str) -> None:
    """A call raises this kind of error with a message that matches, in eager mode and on a compiler's fake tensors."""
    with pytest.raises(kind, match=words):
        call()
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(kind, match=words):
        call()


def check_compiles(script: str) -> None:
    """A script that hands kernels to Triton's compiler succeeds, in a process without the interpreter.

    The interpreter forgives what the compiler does not, such as a variable whose type changes.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    require(done.returncode == 0, done.stderr)


def check_rounding(found: Iterable[Tensor], truth: Iterable[Tensor], dtype: torch.dtype, units: int = 16) -> None:
    """Results deviate from the truth by a few roundings of their dtype, relative to the truth's largest value.

    Args:
        found: results, on any device.
        truth: the same in float64 on the CPU.
        dtype: that of the kernel's inputs; float32 is as fine as a kernel need be, 1e-8 for float64.
        units: machine epsilons that are allowed.
    """
    finest = 1e-8 if dtype == torch.float64 else torch.finfo(torch.float32).eps
    allowed = units * max(torch.finfo(dtype).eps, finest)
    for number, (one, other) in enumerate(zip(found, truth, strict=True)):
        off = (one.cpu().double() - other).abs().max() / other.abs().max().clamp_min(1e-6)
        require(off <= allowed, f"result {number} is off by {off:.1e} of its largest value, allowed is {allowed:.1e}")

"""The checks that the tests of kernels share can fail, and what they lay out is what it was."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from robplug.testing.kernels import (
    check_compiles,
    check_refused,
    check_rounding,
    interpret_without_gpu,
    laid_out,
    poisoned,
)

__all__ = ["poisoned"]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "gaps", "transposed"])
def test_a_layout_changes_strides_and_no_value(layout: str) -> None:
    x = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    found = laid_out(x, layout)
    assert torch.equal(found, x) and found.dtype == x.dtype
    expected = {"contiguous": (60, 20, 5, 1), "channels_last": (60, 1, 15, 3), "transposed": (60, 20, 1, 4)}
    assert found.stride() == expected.get(layout, (300, 100, 10, 2))
    if layout == "gaps":
        between = torch.as_strided(found, (4,), (2,), found.storage_offset() + 1)
        assert between.isnan().all()


def test_uninitialised_memory_is_poisoned(poisoned: None) -> None:
    assert torch.empty(7, dtype=torch.float64).isnan().all()


@pytest.mark.parametrize(
    ("dtype", "fits", "off"),
    [
        (torch.float32, 15 * 2**-23, 17 * 2**-23),
        (torch.bfloat16, 15 * 2**-7, 17 * 2**-7),
        (torch.float64, 15e-8, 17e-8),
    ],
)
def test_rounding_is_measured_by_the_largest_value(dtype: torch.dtype, fits: float, off: float) -> None:
    truth = torch.tensor([0.0, -4.0, 1.0], dtype=torch.float64)
    nudge = torch.tensor([4.0, 0.0, 0.0], dtype=torch.float64)
    check_rounding([truth, truth + fits * nudge], [truth, truth], dtype)
    for wrong in (truth + off * nudge, truth * torch.nan):
        with pytest.raises(AssertionError, match="result 1 is off by"):
            check_rounding([truth, wrong], [truth, truth], dtype)
    with pytest.raises(AssertionError, match="result 0"):
        check_rounding([truth + fits * nudge], [truth], dtype, units=8)


def test_a_refusal_is_wanted_in_eager_mode_and_on_fake_tensors() -> None:
    def refuse(x: Tensor, unless: type | None = None) -> None:
        if unless is None or type(x + 1) is not unless:
            raise ValueError("expected nothing, got 3")

    x = torch.rand(2)
    check_refused(lambda: refuse(x), ValueError, "got 3")
    fake = type(torch._subclasses.fake_tensor.FakeTensorMode().from_tensor(x))
    for unless in (torch.Tensor, fake):
        with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
            check_refused(lambda unless=unless: refuse(x, unless), ValueError, "got 3")  # type: ignore[misc]


def test_a_script_compiles_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    interpret_without_gpu()
    assert os.environ["TRITON_INTERPRET"] == "1"
    check_compiles("import os; assert 'TRITON_INTERPRET' not in os.environ")
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        check_compiles("1 / 0")

"""The frame of a plugin's kernels, on a package that is written for the test."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from robplug.kernels import cuda_kernels, operator

REFERENCE = """
def doubled(x, times):
    return x * 2**times


def counted(steps, totals):
    for step, total in zip(steps, totals):
        total += step
    return steps[0] * 0
"""


@pytest.fixture
def reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module ``reference`` of a package whose ``triton_impl`` imports triton."""
    kernels = tmp_path / "robplug_framed" / "kernels"
    kernels.mkdir(parents=True)
    (kernels / "reference.py").write_text(REFERENCE)
    (kernels / "triton_impl.py").write_text(f"import triton\n{REFERENCE}")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("robplug_framed.kernels.reference")
    for name in [name for name in sys.modules if name.partition(".")[0] == "robplug_framed"]:
        del sys.modules[name]


def check(x: Tensor, times: int) -> None:
    if times < 0:
        raise ValueError(f"expected times >= 0, got {times}")


def test_an_operator_computes_checks_and_compiles(reference: ModuleType) -> None:
    doubled = operator("doubled(Tensor x, int times) -> Tensor", reference, check, lambda x, _: torch.empty_like(x))
    x = torch.rand(3, 2)
    assert torch.equal(torch.ops.robplug_framed.doubled(x, 3), 8 * x)
    torch.library.opcheck(doubled, (x, 3), test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(ValueError, match="got -1"):
        doubled(x, -1)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match="got -1"):
        doubled(x, -1)
    assert torch._C._dispatch_has_kernel_for_dispatch_key("robplug_framed::doubled", "CUDA")


def test_an_operator_writes_to_what_its_schema_says(reference: ModuleType) -> None:
    schema = "counted(Tensor[] steps, Tensor(a!)[] totals) -> Tensor"
    counted = operator(schema, reference, lambda *_: None, lambda steps, _: torch.empty_like(steps[0]))
    steps, totals = [torch.rand(3), torch.rand(2)], [torch.ones(3), torch.ones(2)]
    torch.library.opcheck(counted, (steps, totals), test_utils=("test_schema", "test_faketensor"))
    before = [total._version for total in totals]
    counted(steps, totals)
    assert all(torch.equal(total, 1 + step) for step, total in zip(steps, totals, strict=True))
    assert all(total._version > version for total, version in zip(totals, before, strict=True))


def test_triton_runs_on_cuda_where_it_is_installed(reference: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    assert cuda_kernels(reference).__name__ == "robplug_framed.kernels.triton_impl"


def test_the_reference_runs_on_cuda_without_triton_and_says_so_once(
    reference: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.warns(UserWarning, match=r"triton is not installed.*pip install robplug-framed\[triton\]") as said:
        assert cuda_kernels(reference) is cuda_kernels(reference) is reference
    assert len(said) == 1


def test_another_missing_module_is_an_error(reference: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    assert reference.__file__ is not None
    Path(reference.__file__).with_name("triton_impl.py").write_text("import triton, robplug_no_such_module\n")
    with pytest.raises(ModuleNotFoundError, match="robplug_no_such_module"):
        cuda_kernels(reference)

"""Kernels for the CPU: their arguments, their threads, and machines that lack something."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from robplug.cpu_kernels import (
    GRAIN,
    LINE,
    barrier,
    fetch,
    float32s,
    float64s,
    int8s,
    kernel,
    number,
    portion,
    portion_of_values,
)


@kernel
def moved(words):  # type: ignore[no-untyped-def]
    start, stop = portion_of_values(words[0])
    singles, doubles, bytes_ = float32s(words[1], words[0]), float64s(words[2], words[0]), int8s(words[3], words[0])
    for i in range(start, stop):
        doubles[i] = singles[i] * number(words[4]) + bytes_[i]


@kernel
def shares(words):  # type: ignore[no-untyped-def]
    start, stop = portion(words[0])
    seen = float64s(words[1], words[0])
    for i in range(start, stop):
        seen[i] += stop - start


@kernel
def turned(words):  # type: ignore[no-untyped-def]
    start, stop = portion_of_values(words[0])
    x, out = float32s(words[1], words[0]), float32s(words[2], words[0])
    for _ in range(words[3]):
        for i in range(start, stop):
            out[i] = x[words[0] - 1 - i]
        barrier()
        fetch(words[2] + 4 * stop, 2**20)  # far behind the end, which does no harm
        for i in range(start, stop):
            x[i] = out[words[0] - 1 - i] + 1
        barrier()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_behind_a_barrier_is_what_all_threads_wrote(threads: int) -> None:
    size, rounds = 4 * GRAIN, 20
    x, out, expected = torch.arange(float(size)), torch.empty(size), torch.arange(float(size)) + rounds
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        turned(size, size, x, out, rounds)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("size", [1, LINE, LINE + 1, 2**17 + 5])
def test_each_value_is_written_once_by_some_thread(threads: int, size: int) -> None:
    singles, doubles, bytes_ = (
        torch.randn(size),
        torch.full((size,), torch.nan).double(),
        torch.ones(size).to(torch.int8),
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        moved(size, size, singles, doubles, bytes_, -2.5e-3)
        seen = torch.zeros(2 * threads + 1, dtype=torch.float64)
        shares(2**20, len(seen), seen)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(doubles, singles.double() * -2.5e-3 + 1)
    assert seen.max() == -(-len(seen) // threads) and seen.min() > 0


SCRIPT = """
import pathlib
import torch
from robplug import cpu_kernels
from robplug.cpu_kernels import *

cpu_kernels.Path = lambda file: pathlib.Path("nowhere")
torch.set_num_threads(2)

@kernel
def counted(words):
    start, stop = portion(words[0])
    float64s(words[1], 1)[0] = stop - start

seen = torch.zeros(1, dtype=torch.float64)
counted(2**20, 10, seen)
print(int(seen))
"""


def test_without_openmp_or_a_file_to_cache_beside_it_still_runs() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 10, done.stderr


def test_an_argument_without_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a tensor with values in memory, got Tensor"):
        shares(1, 0, torch.zeros(0, dtype=torch.float64))


KERNEL = """
from robplug.cpu_kernels import float64s, kernel
from numba_helper import value

@kernel
def told(words):
    float64s(words[0], 1)[0] = value()
"""


def test_what_was_compiled_before_a_file_beside_it_changed_is_compiled_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "numba_impl.py").write_text(KERNEL)
    for value in (1, 2):
        (tmp_path / "numba_helper.py").write_text(f"import numba\n\n@numba.njit\ndef value():\n    return {value}\n")
        for name in ("numba_impl", "numba_helper"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        x = torch.zeros(1, dtype=torch.float64)
        importlib.import_module("numba_impl").told(1, x)
        assert int(x) == value
        assert list(tmp_path.glob("__pycache__/numba_impl.told-*.nbi"))


FROM_FILE = """
import importlib.util, sys
import torch

spec = importlib.util.spec_from_file_location(sys.argv[2], sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules[sys.argv[2]] = module
spec.loader.exec_module(module)
seen = torch.zeros(1, dtype=torch.float64)
module.counted(1, seen)
print(int(seen))
"""


def test_a_cache_of_a_module_that_is_gone_is_not_used(tmp_path: Path) -> None:
    code = "from robplug.cpu_kernels import float64s, kernel\n\n@kernel\ndef counted(words):\n"
    (tmp_path / "file.py").write_text(code + "    float64s(words[0], 1)[0] = 3\n")
    for name in ("one", "another"):
        done = [sys.executable, "-c", FROM_FILE, str(tmp_path / "file.py"), name]
        assert int(subprocess.run(done, capture_output=True, text=True, check=True).stdout) == 3

"""Two processes, each with its share of a batch, are one process with all of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

SCRIPT = Path(__file__).parent / "two_processes.py"


CASES = ("training", "second_order", "whole_batches", "far_from_zero", "half_precision", "eval_mode")
CLOSE = {"far_from_zero": 1e-4, "half_precision": 2**-8}  # 1e-10 of the rest, in double precision


def run(folder: Path, *cases: str) -> list[dict[str, Any]]:
    """Returns what the two processes found; both are gone by then, whatever happened."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    warnings = ("-W", "error", "-W", "ignore::DeprecationWarning")  # of the compiler itself
    command = [sys.executable, *warnings, str(SCRIPT), str(folder), *cases]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(timeout=90)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert code == 0, (folder / "log").read_text()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(tmp_path_factory.mktemp("processes"), *CASES, "errors")


def compare(pairs: dict[str, tuple[Tensor, Tensor]], close: float) -> None:
    for name, (ours, expected) in pairs.items():
        torch.testing.assert_close(
            ours, expected, rtol=close, atol=close, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(found: list[dict[str, Any]], case: str, rank: int) -> None:
    pairs = found[rank][case]
    assert pairs or (case, rank) == ("eval_mode", 0)
    compare(pairs, CLOSE.get(case, 1e-10))


@pytest.mark.slow
def test_compiled_without_a_graph_break(tmp_path: Path) -> None:
    for one in run(tmp_path, "compiled"):
        assert len(one["compiled"]) == 10
        compare(one["compiled"], 1e-10)


def test_statistics_of_too_few_values_are_an_error_in_every_process(found: list[dict[str, Any]]) -> None:
    few = "expected at least 2 values a channel from all processes together in training, got {} for statistics 1; make"
    for rank in range(2):
        errors = found[rank]["errors"]
        assert errors["one value"].startswith(few.format(1)) and errors["no value"].startswith(few.format(0))
        assert errors["negative"].startswith("expected sizes >= 0, got sizes=[3, -1]")

"""What the kernels' tests share; the Triton kernels run in triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# read when a kernel is decorated, so before any test imports one
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Tests that draw their own inputs draw the same ones each time."""
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fills uninitialised memory with NaN, so that a cell that nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)

"""One thread per worker: pytest-xdist runs two of them on two cores."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Tests that draw their own inputs draw the same ones each time."""
    torch.manual_seed(0)

"""One thread per worker: pytest-xdist runs two of them on two cores."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

from robplug.testing.kernels import interpret_without_gpu

# torchvision's operators bring triton in, and its own kernels are decorated when it is first imported
interpret_without_gpu()
torch.set_num_threads(1)
# a shell that runs tests in the background has them ignore Ctrl-C, which some of them send
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Tests that draw their own inputs draw the same ones each time."""
    torch.manual_seed(0)

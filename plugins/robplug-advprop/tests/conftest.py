"""What the tests share; the Triton kernels run in triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from robplug.testing.kernels import interpret_without_gpu, poisoned, seeded
from robplug_advprop.kernels import parts

__all__ = ["poisoned", "seeded"]

interpret_without_gpu()
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batches of tests are small, and go the way of large ones."""
    monkeypatch.setattr(parts, "FEW", 0)

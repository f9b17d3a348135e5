"""What the tests share; the Triton kernels run in triton's interpreter where there is no GPU."""

from __future__ import annotations

import torch

from robplug.testing.kernels import interpret_without_gpu, poisoned, seeded

__all__ = ["poisoned", "seeded"]

interpret_without_gpu()
torch.set_num_threads(1)

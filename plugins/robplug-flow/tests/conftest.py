"""The Triton kernels run in triton's interpreter, which has to be chosen before a kernel is defined."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

torch.set_num_threads(1)

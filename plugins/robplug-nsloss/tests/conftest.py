"""What the tests share; the Triton kernels run in triton's interpreter where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robplug.testing.kernels import interpret_without_gpu, poisoned, seeded

__all__ = ["poisoned", "seeded"]

interpret_without_gpu()  # before the plugin is imported, which imports triton
torch.set_num_threads(1)


@pytest.fixture
def nothing() -> Callable[[Tensor], Tensor]:
    """Returns the identity that hides its gradient."""

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> None:
            return None

    return Nothing.apply  # type: ignore[no-any-return]


@pytest.fixture
def precisions(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], list[str]]:
    """Returns what compares a network's NsLoss of three draws, and its gradients, in single and in double precision.

    The network takes (N, 2, 8, 8). Returned are the names of the kernels for the CPU as they were called.
    """
    from robplug_nsloss import ns_loss
    from robplug_nsloss.kernels import numba_impl

    calls: list[str] = []
    for name in ("accumulate_signs", "add_signs", "relu_add_signs", "batch_norm_backward"):
        kernel = getattr(numba_impl, name)
        monkeypatch.setattr(numba_impl, name, lambda *args, k=kernel, n=name: (calls.append(n), k(*args))[1])

    def compare(model: nn.Module) -> list[str]:
        x, found = torch.rand(6, 2, 8, 8), []
        noise = torch.randn(3, *x.shape, dtype=torch.float64)
        for dtype in (torch.float32, torch.float64):
            draws = iter(noise.to(dtype))
            monkeypatch.setattr(torch, "randn", lambda *_, draws=draws, **__: next(draws))
            model.to(dtype)
            loss = ns_loss(model, x.to(dtype), radius=0.5, draws=3)
            found.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
        for single, double in zip(*found, strict=True):
            # a sign may differ where two activations hardly do
            assert float((single - double).abs().max()) <= 2e-3 * float(double.abs().max()) + 1e-6
        return calls

    return compare

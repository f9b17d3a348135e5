"""Which implementation of a kernel is called: on the CPU, an operator's call costs more than a small layer."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from robplug_nsloss.kernels import checks, reference


def call(name: str, *args: Any) -> Any:
    """Calls an operator, or on the CPU the reference itself: for a small layer, the call costs more than the layer."""
    first = args[0] if isinstance(args[0], Tensor) else next(iter(args[0]), None)
    if torch.compiler.is_compiling() or (first is not None and not first.is_cpu):
        return getattr(torch.ops.robplug_nsloss, name)(*args)
    getattr(checks, name)(*args)
    return getattr(reference, name)(*args)


def parts_and_signs(clean: Tensor, noisy: Tensor, sums: Tensor, draw: int) -> tuple[Tensor, Tensor]:
    """Returns parts of mean |noisy - clean|, to be added up, and sign(noisy - clean), which is added to sums.

    To be called on the CPU as soon as a layer is computed: it is in the cache then, and Python is not, so that all that
    can wait is left for later.
    """
    if clean.shape == noisy.shape and is_native(noisy, sums) and clean.stride() == noisy.stride():
        return _cpu_kernels().accumulate_signs(clean, noisy, sums, draw)  # type: ignore[no-any-return]
    checks.accumulate_signs([clean], [noisy], [sums], draw)
    return reference.accumulate_one(clean, noisy, sums, draw)


def added(g: Tensor, signs: Tensor, weight: Tensor) -> Tensor:
    """Returns g + weight * signs / numel."""
    if is_native(g, signs) and not torch.compiler.is_compiling():
        return _cpu_kernels().add_signs(g, signs, weight)  # type: ignore[no-any-return]
    return call("add_signs", g, signs, weight)  # type: ignore[no-any-return]


def is_native(x: Tensor, signs: Tensor) -> bool:
    """Returns whether the kernels for the CPU can go over x and signs of it: laid out alike, and without gaps."""
    dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    alike = x.shape == signs.shape and x.stride() == signs.stride()
    return dense and alike and x.is_cpu and x.dtype == torch.float32


@functools.cache
def _cpu_kernels() -> ModuleType:
    """Returns the kernels for the CPU, whose compiler takes half a second to import."""
    from robplug_nsloss.kernels import numba_impl

    return numba_impl

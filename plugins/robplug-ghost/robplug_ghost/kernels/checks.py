"""The checks of the operators' arguments: what was expected, the value and the remedy.

One function per operator, with the operator's arguments; it serves the implementation and the fake one alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def erode_add(shortcut: Tensor, residual: Tensor, seed: int, layer: int, skip: float, relu: bool) -> None:
    """Checks the arguments of erode_add."""
    erode_scale(residual, seed, layer, skip, name="residual")
    _alike("shortcut", shortcut, "residual", residual)


def erode_add_backward(g: Tensor, out: Tensor, seed: int, layer: int, skip: float) -> None:
    """Checks the arguments of erode_add_backward."""
    erode_scale(out, seed, layer, skip, name="out")
    _alike("g", g, "out", out)


def erode_scale(x: Tensor, seed: int, layer: int, skip: float, name: str = "x") -> None:
    """Checks the arguments of erode_scale."""
    _batch(name, x)
    _counter(seed, layer)
    if not 0 <= skip <= 1:
        raise ValueError(f"expected 0 <= skip <= 1, got {skip}; the paper's is 0.22 for ResNet-50")


def erode_dropout(x: Tensor, seed: int, layer: int, keep: float) -> None:
    """Checks the arguments of erode_dropout."""
    _batch("x", x)
    _counter(seed, layer)
    if not 0 < keep <= 1:
        raise ValueError(f"expected 0 < keep <= 1, got {keep}; it is the probability to stay, such as 0.994")


def _batch(name: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        known = "float16, bfloat16, float32 or float64"
        raise TypeError(f"expected {name} of {known}, got {x.dtype}; convert it: {name}.float()")
    if x.dim() < 2:
        raise ValueError(f"expected {name} of shape (N, C, ...), got {tuple(x.shape)}; give a batch with channels")


def _alike(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if (tensor.shape, tensor.dtype, tensor.device) != (other.shape, other.dtype, other.device):
        wanted = f"{tuple(other.shape)} of {other.dtype} on {other.device}, as {other_name} is"
        got = f"{tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"
        raise ValueError(f"expected {name} {wanted}, got {got}; an erosion neither broadcasts nor moves")


def _counter(seed: int, layer: int) -> None:
    if not 0 <= seed < 2**63:
        raise ValueError(f"expected a seed from 0 to 2**63 - 1, got {seed}; take it modulo 2**63")
    if not 0 <= layer < 2**31:
        raise ValueError(f"expected a layer from 0 to 2**31 - 1, got {layer}; number the layers from 0")

"""The checks of the operators' arguments: what was expected, the value and the remedy.

One function per operator, with the operator's arguments; it serves the implementation and the fake one alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DRAWS = 127  # whose signs an int8 can sum


def sphere_noise(x: Tensor, noise: Tensor, radius: float) -> None:
    """Checks the arguments of sphere_noise."""
    _floating("x", x)
    _floating("noise", noise)
    if x.dim() < 2:
        raise ValueError(f"expected x of shape (N, ...), got {tuple(x.shape)}; give a batch")
    if (noise.shape, noise.device) != (x.shape, x.device):
        wanted, got = f"{tuple(x.shape)} on {x.device}", f"{tuple(noise.shape)} on {noise.device}"
        raise ValueError(f"expected noise of shape {wanted}, as x is, got {got}; draw it by torch.randn_like(x)")
    if noise.requires_grad:
        raise ValueError("expected noise without a gradient, got one that requires it; give noise.detach()")
    if not (math.isfinite(radius) and radius > 0):
        raise ValueError(f"expected a finite radius > 0, got {radius}; the paper's are 1.0 for MNIST, 3.0 for CIFAR-10")


def mean_abs_difference(clean: Sequence[Tensor], noisy: Sequence[Tensor]) -> None:
    """Checks the arguments of mean_abs_difference."""
    if len(clean) != len(noisy) or not noisy:
        got = f"{len(clean)} clean and {len(noisy)} noisy"
        raise ValueError(f"expected as many clean as noisy layers and at least one, got {got}; collect the same ones")
    for number, (one, other) in enumerate(zip(clean, noisy, strict=True)):
        _floating(f"clean[{number}]", one)
        _alike(f"noisy[{number}]", other, f"clean[{number}]", one)
        if one.device != clean[0].device:
            remedy = "move the layers to one device"
            raise ValueError(
                f"expected clean[{number}] on {clean[0].device}, as clean[0] is, got {one.device}; {remedy}"
            )
        if not one.numel():
            raise ValueError(f"expected clean[{number}] with values, got shape {tuple(one.shape)}; leave the layer out")


def mean_abs_difference_backward(g: Tensor, clean: Sequence[Tensor], noisy: Sequence[Tensor], both: bool) -> None:
    """Checks the arguments of mean_abs_difference_backward."""
    mean_abs_difference(clean, noisy)
    _scalar("g", g)


def accumulate_signs(clean: Sequence[Tensor], noisy: Sequence[Tensor], sums: Sequence[Tensor], draw: int) -> None:
    """Checks the arguments of accumulate_signs."""
    mean_abs_difference(clean, noisy)
    if len(sums) != len(noisy):
        raise ValueError(f"expected a sum for each of {len(noisy)} layers, got {len(sums)}")
    for number, (total, layer) in enumerate(zip(sums, noisy, strict=True)):
        _counted(f"sums[{number}]", total, f"noisy[{number}]", layer)
    if not 0 <= draw < DRAWS:
        limit = f"an int8 sums the signs of {DRAWS} draws"
        raise ValueError(f"expected 0 <= draw < {DRAWS}, got {draw}; {limit}: take fewer or begin other sums")


def add_signs(g: Tensor, signs: Tensor, weight: Tensor) -> None:
    """Checks the arguments of add_signs."""
    _floating("g", g)
    surrogate([g], [signs])
    _scalar("weight", weight)


def surrogate(layers: Sequence[Tensor], signs: Sequence[Tensor]) -> None:
    """Checks the arguments of sign_surrogate."""
    if len(layers) != len(signs) or not layers:
        raise ValueError(f"expected signs for each layer and at least one, got {len(signs)} for {len(layers)} layers")
    for number, (layer, sign) in enumerate(zip(layers, signs, strict=True)):
        _counted(f"signs[{number}]", sign, f"layers[{number}]", layer)


def _counted(name: str, signs: Tensor, layer_name: str, layer: Tensor) -> None:
    if (signs.shape, signs.dtype, signs.device) != (layer.shape, torch.int8, layer.device):
        wanted, got = f"{tuple(layer.shape)} of torch.int8 on {layer.device}", f"{tuple(signs.shape)} of {signs.dtype}"
        remedy = f"make it by torch.empty_like({layer_name}, dtype=torch.int8)"
        raise ValueError(f"expected {name} {wanted}, got {got} on {signs.device}; {remedy}")


def _floating(name: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        known = "float16, bfloat16, float32 or float64"
        raise TypeError(f"expected {name} of {known}, got {x.dtype}; convert it: {name}.float()")


def _alike(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if (tensor.shape, tensor.dtype, tensor.device) != (other.shape, other.dtype, other.device):
        wanted = f"{tuple(other.shape)} of {other.dtype} on {other.device}, as {other_name} is"
        got = f"{tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"
        raise ValueError(f"expected {name} {wanted}, got {got}; compare the same layer of two passes")


def _scalar(name: str, tensor: Tensor) -> None:
    if tensor.dim():
        raise ValueError(f"expected {name} of one value, shape (), got {tuple(tensor.shape)}")

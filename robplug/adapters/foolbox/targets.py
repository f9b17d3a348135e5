"""Foolbox's PyTorchModel as a target."""

from __future__ import annotations

import inspect
from typing import Any

import foolbox
import torch
from torch import Tensor, nn

from robplug.errors import InputError
from robplug.targets import Target, from_module


class _Preprocessed(nn.Module):
    """A network behind Foolbox's preprocessing: flip, subtract the mean, divide by the standard deviation."""

    mean: Tensor | None
    std: Tensor | None

    def __init__(self, module: nn.Module, mean: Tensor | None, std: Tensor | None, flip_axis: int | None) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self._flip_axis = flip_axis

    def forward(self, x: Tensor) -> Tensor:
        if self._flip_axis is not None:
            x = torch.flip(x, (self._flip_axis,))
        if self.mean is not None:
            x = x - self.mean
        if self.std is not None:
            x = x / self.std
        return self.module(x)  # type: ignore[no-any-return]


def from_model(model: foolbox.PyTorchModel, **options: Any) -> Target:
    """Makes a Target whose logits are those of a Foolbox model.

    Args:
        model: its bounds and its preprocessing (mean, std, axis, flip_axis) are honoured.
        **options: those of `robplug.targets.from_module`, but for ``bounds``.

    Raises:
        InputError: ``bounds`` was given.
    """
    bounds = (float(model.bounds.lower), float(model.bounds.upper))
    if "bounds" in options:
        raise InputError(f"the Foolbox model's own bounds {bounds}", f"bounds={options['bounds']}", "leave bounds out")
    # the network itself is kept nowhere but in the closure of the function that calls it
    module = inspect.getclosurevars(model._model).nonlocals["model"]
    mean, std, flip_axis = model._preprocess_args
    if any(item is not None for item in (mean, std, flip_axis)):
        module = _Preprocessed(module, _native(mean), _native(std), flip_axis)
    return from_module(module, bounds=bounds, **options)


def _native(tensor: Any) -> Tensor | None:
    return None if tensor is None else tensor.raw

"""Regularisation of neural activation sensitivity (NsLoss) and of the Jacobian, and their kernels.

The names below are loaded when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robplug_nsloss.jacobian import jacobian_penalty
    from robplug_nsloss.kernels.ops import accumulate_signs, mean_abs_difference, sphere_noise
    from robplug_nsloss.sensitivity import layer_sensitivity, ns_loss

__all__ = [
    "accumulate_signs",
    "jacobian_penalty",
    "layer_sensitivity",
    "mean_abs_difference",
    "ns_loss",
    "sphere_noise",
]

_HOMES = {
    "accumulate_signs": "kernels.ops",
    "jacobian_penalty": "jacobian",
    "layer_sensitivity": "sensitivity",
    "mean_abs_difference": "kernels.ops",
    "ns_loss": "sensitivity",
    "sphere_noise": "kernels.ops",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'robplug_nsloss' has no attribute {name!r}")
    return getattr(importlib.import_module(f"robplug_nsloss.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

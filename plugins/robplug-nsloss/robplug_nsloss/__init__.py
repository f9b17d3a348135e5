"""Regularisation of neural activation sensitivity (NsLoss) and of the Jacobian, and their kernels.

The names below are loaded when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from robplug.lazy import exports

if TYPE_CHECKING:
    from robplug_nsloss.jacobian import jacobian_penalty
    from robplug_nsloss.kernels.ops import accumulate_signs, mean_abs_difference, sphere_noise
    from robplug_nsloss.sensitivity import LayerSensitivity, layer_sensitivity, ns_loss

__all__ = [
    "LayerSensitivity",
    "accumulate_signs",
    "jacobian_penalty",
    "layer_sensitivity",
    "mean_abs_difference",
    "ns_loss",
    "sphere_noise",
]

__getattr__, __dir__ = exports(
    __name__,
    {
        "jacobian": ["jacobian_penalty"],
        "kernels.ops": ["accumulate_signs", "mean_abs_difference", "sphere_noise"],
        "sensitivity": ["LayerSensitivity", "layer_sensitivity", "ns_loss"],
    },
)

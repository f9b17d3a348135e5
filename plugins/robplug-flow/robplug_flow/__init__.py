"""Flow attacks and flow gradient regularisation, and their pieces on bare tensors.

The names below are loaded when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from robplug.lazy import exports

if TYPE_CHECKING:
    from robplug_flow.defense import fgr
    from robplug_flow.kernels.ops import flow_gradient_penalty, flow_smoothness, warp
    from robplug_flow.metrics import largest_displacement, total_variation
    from robplug_flow.units import to_normalized, to_pixels

__all__ = [
    "fgr",
    "flow_gradient_penalty",
    "flow_smoothness",
    "largest_displacement",
    "to_normalized",
    "to_pixels",
    "total_variation",
    "warp",
]

__getattr__, __dir__ = exports(
    __name__,
    {
        "defense": ["fgr"],
        "kernels.ops": ["flow_gradient_penalty", "flow_smoothness", "warp"],
        "metrics": ["largest_displacement", "total_variation"],
        "units": ["to_normalized", "to_pixels"],
    },
)

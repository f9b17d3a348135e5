"""Flow attacks and flow gradient regularisation, and their pieces on bare tensors.

The names below are loaded when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

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

_HOMES = {
    "fgr": "defense",
    "flow_gradient_penalty": "kernels.ops",
    "flow_smoothness": "kernels.ops",
    "largest_displacement": "metrics",
    "to_normalized": "units",
    "to_pixels": "units",
    "total_variation": "metrics",
    "warp": "kernels.ops",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'robplug_flow' has no attribute {name!r}")
    return getattr(importlib.import_module(f"robplug_flow.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

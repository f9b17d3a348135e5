"""Ghost networks: ensembles of many networks by erosion of one, and the kernels that erode.

The names below are loaded when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robplug_ghost.kernels.ops import erode_add, erode_dropout, erode_scale
    from robplug_ghost.network import GhostNetwork

__all__ = ["GhostNetwork", "erode_add", "erode_dropout", "erode_scale"]

_HOMES = {
    "GhostNetwork": "network",
    "erode_add": "kernels.ops",
    "erode_dropout": "kernels.ops",
    "erode_scale": "kernels.ops",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'robplug_ghost' has no attribute {name!r}")
    return getattr(importlib.import_module(f"robplug_ghost.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Ghost networks: ensembles of many networks by erosion of one, and the kernels that erode.

The names below are loaded when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from robplug.lazy import exports

if TYPE_CHECKING:
    from robplug_ghost.kernels.ops import erode_add, erode_dropout, erode_scale
    from robplug_ghost.network import GhostNetwork

__all__ = ["GhostNetwork", "erode_add", "erode_dropout", "erode_scale"]

__getattr__, __dir__ = exports(
    __name__,
    {
        "kernels.ops": ["erode_add", "erode_dropout", "erode_scale"],
        "network": ["GhostNetwork"],
    },
)

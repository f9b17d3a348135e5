"""Input diversity: attacks whose gradients come from randomly resized and padded images, and the pieces of it.

The names below are loaded when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from robplug.lazy import exports

if TYPE_CHECKING:
    from robplug_di2.diversity import InputDiversity
    from robplug_di2.kernels.ops import resize_pad

__all__ = ["InputDiversity", "resize_pad"]

__getattr__, __dir__ = exports(
    __name__,
    {
        "diversity": ["InputDiversity"],
        "kernels.ops": ["resize_pad"],
    },
)

"""Input diversity: attacks whose gradients come from randomly resized and padded images, and the pieces of it.

The names below are loaded when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robplug_di2.diversity import InputDiversity
    from robplug_di2.kernels.ops import resize_pad

__all__ = ["InputDiversity", "resize_pad"]

_HOMES = {"InputDiversity": "diversity", "resize_pad": "kernels.ops"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'robplug_di2' has no attribute {name!r}")
    return getattr(importlib.import_module(f"robplug_di2.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Adapters to ART, Foolbox and torchattacks; nothing else of the host imports them.

Each is imported, and its library with it, when it is first used.
"""

from __future__ import annotations

import importlib
from types import ModuleType

LIBRARIES = ("art", "foolbox", "torchattacks")


def __getattr__(name: str) -> ModuleType:
    if name in LIBRARIES:
        return importlib.import_module(f"robplug.adapters.{name}")
    raise AttributeError(f"module 'robplug.adapters' has no attribute {name!r}")

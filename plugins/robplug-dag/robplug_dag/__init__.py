"""Dense Adversary Generation: adversarial examples for segmentation and detection, and its kernels.

The names below are loaded when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robplug_dag.dense import Record, dag
    from robplug_dag.kernels.ops import dense_adversary_grad, normalised_step

__all__ = ["Record", "dag", "dense_adversary_grad", "normalised_step"]

_HOMES = {
    "Record": "dense",
    "dag": "dense",
    "dense_adversary_grad": "kernels.ops",
    "normalised_step": "kernels.ops",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'robplug_dag' has no attribute {name!r}")
    return getattr(importlib.import_module(f"robplug_dag.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Dense Adversary Generation: adversarial examples for segmentation and detection, and its kernels.

The names below are loaded when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robplug_dag.dense import Record, dag
    from robplug_dag.goals import leave_out, permuted_goals, random_goals, random_permutations
    from robplug_dag.kernels.ops import dense_adversary_grad, normalised_step
    from robplug_dag.measures import perceptibility, permuted
    from robplug_dag.shapes import fooling_start, label_map, strongest_rivals, text_mask

__all__ = [
    "Record",
    "dag",
    "dense_adversary_grad",
    "fooling_start",
    "label_map",
    "leave_out",
    "normalised_step",
    "perceptibility",
    "permuted",
    "permuted_goals",
    "random_goals",
    "random_permutations",
    "strongest_rivals",
    "text_mask",
]

_HOMES = {
    "Record": "dense",
    "dag": "dense",
    "dense_adversary_grad": "kernels.ops",
    "fooling_start": "shapes",
    "label_map": "shapes",
    "leave_out": "goals",
    "normalised_step": "kernels.ops",
    "perceptibility": "measures",
    "permuted": "measures",
    "permuted_goals": "goals",
    "random_goals": "goals",
    "random_permutations": "goals",
    "strongest_rivals": "shapes",
    "text_mask": "shapes",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'robplug_dag' has no attribute {name!r}")
    return getattr(importlib.import_module(f"robplug_dag.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

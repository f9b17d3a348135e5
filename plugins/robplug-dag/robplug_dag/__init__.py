"""Dense Adversary Generation: adversarial examples for segmentation and detection, and its kernels.

The names below are loaded when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from robplug.lazy import exports

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

__getattr__, __dir__ = exports(
    __name__,
    {
        "dense": ["Record", "dag"],
        "goals": ["leave_out", "permuted_goals", "random_goals", "random_permutations"],
        "kernels.ops": ["dense_adversary_grad", "normalised_step"],
        "measures": ["perceptibility", "permuted"],
        "shapes": ["fooling_start", "label_map", "strongest_rivals", "text_mask"],
    },
)

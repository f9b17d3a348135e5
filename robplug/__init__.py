"""robplug: papers' attacks and defences as plugins for ART, Foolbox and torchattacks, and a referee that trusts none.

The names below are loaded when they are first used, so that ``import robplug`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robplug.api import (
        attack,
        dataset,
        defense,
        evaluate,
        list_attacks,
        list_datasets,
        list_defenses,
        list_norms,
        list_targets,
        target,
        train,
    )
    from robplug.errors import InputError, PlanError, PluginError, RobplugError, ThreatError, UnknownNameError
    from robplug.hookspecs import hookimpl
    from robplug.types import (
        AttackSpec,
        DatasetSpec,
        DefenseSpec,
        NormSpec,
        Perturbed,
        SampleResult,
        TargetSpec,
        ThreatModel,
    )

__all__ = [
    "AttackSpec",
    "DatasetSpec",
    "DefenseSpec",
    "InputError",
    "NormSpec",
    "Perturbed",
    "PlanError",
    "PluginError",
    "RobplugError",
    "SampleResult",
    "TargetSpec",
    "ThreatError",
    "ThreatModel",
    "UnknownNameError",
    "adapters",
    "attack",
    "dataset",
    "defense",
    "evaluate",
    "hookimpl",
    "list_attacks",
    "list_datasets",
    "list_defenses",
    "list_norms",
    "list_targets",
    "target",
    "train",
]

_HOMES = {
    "robplug.hookspecs": ("hookimpl",),
    "robplug.errors": ("InputError", "PlanError", "PluginError", "RobplugError", "ThreatError", "UnknownNameError"),
    "robplug.types": tuple(name for name in __all__ if name.endswith(("Spec", "Model", "Perturbed", "Result"))),
}


def __getattr__(name: str) -> Any:
    if name == "adapters":
        return importlib.import_module("robplug.adapters")
    if name not in __all__:
        raise AttributeError(f"module 'robplug' has no attribute {name!r}")
    home = next((module for module, names in _HOMES.items() if name in names), "robplug.api")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

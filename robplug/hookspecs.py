"""The five hooks of robplug: the whole contract between the host and a plugin.

A plugin is a module named by an entry point of the group ``robplug``. It marks its functions with
``robplug.hookimpl``. A hook takes no argument, does no I/O and returns a list of Specs; what a Spec names is
imported when somebody asks for it.
"""

from __future__ import annotations

import pluggy

from robplug.types import AttackSpec, DatasetSpec, DefenseSpec, NormSpec, TargetSpec

GROUP = "robplug"
hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def robplug_attacks() -> list[AttackSpec]:  # type: ignore[empty-body]
    """Attacks. ``make`` names a frozen dataclass with the method ``run`` of `robplug.types.Attack`."""


@hookspec
def robplug_defenses() -> list[DefenseSpec]:  # type: ignore[empty-body]
    """Defences for training. ``make`` names a frozen dataclass derived from `robplug.defenses.Defense`."""


@hookspec
def robplug_targets() -> list[TargetSpec]:  # type: ignore[empty-body]
    """Models, and ways to turn foreign objects into a `robplug.targets.Target` (``accepts``)."""


@hookspec
def robplug_datasets() -> list[DatasetSpec]:  # type: ignore[empty-body]
    """Data sets. ``make`` names a function ``(split, **params) -> robplug.data.Dataset``."""


@hookspec
def robplug_norms() -> list[NormSpec]:  # type: ignore[empty-body]
    """Norms. ``make`` names an object with the methods of `robplug.norms.Norm`."""

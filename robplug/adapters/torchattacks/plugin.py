"""The hooks of the adapter: what the catalogue lists; neither torch nor the library is imported."""

from __future__ import annotations

from robplug.adapters.common import attack_specs
from robplug.hookspecs import hookimpl
from robplug.types import AttackSpec


@hookimpl
def robplug_attacks() -> list[AttackSpec]:
    """The attacks of torchattacks."""
    return attack_specs("torchattacks")

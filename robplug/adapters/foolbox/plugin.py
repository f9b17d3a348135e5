"""The hooks of the adapter: what the catalogue lists; neither torch nor the library is imported."""

from __future__ import annotations

from robplug.adapters.common import attack_specs
from robplug.hookspecs import hookimpl
from robplug.types import AttackSpec, TargetSpec


@hookimpl
def robplug_attacks() -> list[AttackSpec]:
    """The attacks of Foolbox."""
    return attack_specs("foolbox")


@hookimpl
def robplug_targets() -> list[TargetSpec]:
    """Foolbox's models of PyTorch networks."""
    return [
        TargetSpec(
            name="foolbox/pytorch-model",
            make="robplug.adapters.foolbox.targets:from_model",
            summary="a Foolbox PyTorchModel, its bounds and preprocessing included",
            accepts=("foolbox.models.pytorch.PyTorchModel",),
        )
    ]

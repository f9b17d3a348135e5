"""The hooks of the adapter: what the catalogue lists; neither torch nor the library is imported."""

from __future__ import annotations

from robplug.adapters.common import attack_specs
from robplug.hookspecs import hookimpl
from robplug.types import AttackSpec, TargetSpec


@hookimpl
def robplug_attacks() -> list[AttackSpec]:
    """The attacks of ART."""
    return attack_specs("art")


@hookimpl
def robplug_targets() -> list[TargetSpec]:
    """ART's classifiers of PyTorch networks."""
    return [
        TargetSpec(
            name="art/pytorch-classifier",
            make="robplug.adapters.art.targets:from_estimator",
            summary="an ART PyTorchClassifier, its clip_values, preprocessing and defences included",
            accepts=("art.estimators.classification.pytorch.PyTorchClassifier",),
        )
    ]

"""The host's own plugin: it uses the hooks as any other does."""

from __future__ import annotations

from robplug.hookspecs import hookimpl
from robplug.types import AttackSpec, NormSpec, TargetSpec


@hookimpl
def robplug_attacks() -> list[AttackSpec]:
    """The baselines."""
    pixel = ("linf", "l2", "l1")
    return [
        AttackSpec(
            name="robplug/fgsm",
            make="robplug.attacks:FGSM",
            summary="one steepest step of length eps",
            source="Goodfellow et al. 2015, section 4",
            norms=pixel,
            canonical="fgsm",
        ),
        AttackSpec(
            name="robplug/pgd",
            make="robplug.attacks:PGD",
            summary="projected gradient descent; broken samples leave the batch",
            source="Madry et al. 2018, section 2.1",
            params={"steps": 20, "step_size": None, "random_start": True, "restarts": 1, "early_stop": True},
            norms=pixel,
            stochastic=True,
            canonical="pgd",
        ),
        AttackSpec(
            name="robplug/noise",
            make="robplug.attacks:Noise",
            summary="random points of the ball",
            params={"draws": 10},
            norms=(*pixel, "l0"),
            needs="labels",
            stochastic=True,
        ),
    ]


@hookimpl
def robplug_norms() -> list[NormSpec]:
    """The pixel norms."""
    return [
        NormSpec(name="linf", make="robplug.norms:LINF", summary="largest absolute change of a value"),
        NormSpec(name="l2", make="robplug.norms:L2", summary="Euclidean length of the change"),
        NormSpec(name="l1", make="robplug.norms:L1", summary="sum of absolute changes"),
        NormSpec(name="l0", make="robplug.norms:L0", summary="number of changed values", unit="values"),
    ]


@hookimpl
def robplug_targets() -> list[TargetSpec]:
    """PyTorch modules."""
    return [
        TargetSpec(
            name="robplug/module",
            make="robplug.targets:from_module",
            summary="any nn.Module that gives logits",
            accepts=("torch.nn.modules.module.Module",),
        ),
    ]

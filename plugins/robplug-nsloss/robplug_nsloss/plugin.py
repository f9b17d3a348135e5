"""What robplug-nsloss offers to the host."""

from __future__ import annotations

from robplug import AttackSpec, hookimpl

PAPER = "Fidel et al. 2020, Adversarial Robustness via Stochastic Regularization of Neural Activation Sensitivity"
SEARCH = {
    "steps": 1000,
    "step_size": 0.01,
    "confidence": 0.0,
    "binary_search_steps": 9,
    "initial_const": 1e-3,
    "abort_early": True,
}


@hookimpl
def robplug_attacks() -> list[AttackSpec]:
    """The paper's adaptive attacks."""
    return [
        AttackSpec(
            name="nsloss/cw-restarts",
            make="robplug_nsloss.attack:RestartedCarliniWagner",
            summary="C&W in l2 from the sample and from random starts around it",
            source=f"{PAPER}, section IV.A; Carlini and Wagner 2017, section VI.A",
            params={**SEARCH, "restarts": 10, "start_radius": 1.0},
            norms=("l2",),
            budget="minimal",
            stochastic=True,
        ),
        AttackSpec(
            name="nsloss/cw-averaged",
            make="robplug_nsloss.attack:AveragedCarliniWagner",
            summary="C&W in l2 on the mean gradient of points around the image",
            source=f"{PAPER}, section IV.A; Carlini and Wagner 2017, section VI.A",
            params={**SEARCH, "draws": 10, "radius": 0.01},
            norms=("l2",),
            budget="minimal",
            stochastic=True,
        ),
    ]

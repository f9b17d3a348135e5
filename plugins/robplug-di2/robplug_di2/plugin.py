"""What robplug-di2 offers to the host."""

from __future__ import annotations

from robplug import AttackSpec, hookimpl

PAPER = "Xie et al. 2019, Improving Transferability of Adversarial Examples with Input Diversity"
DIVERSITY = {
    "p": 0.5,
    "ratio": 330 / 299,
    "mode": "nearest",
    "padding": "grey",
    "resize_back": False,
    "per_sample": False,
}
STEPS = {"steps": None, "step_size": None, "draws": 1, "random_start": False}


@hookimpl
def robplug_attacks() -> list[AttackSpec]:
    """The paper's attacks."""
    return [
        AttackSpec(
            name="di2/di2-fgsm",
            make="robplug_di2.attack:DiverseFGSM",
            summary="signed steps on randomly resized and padded images",
            source=f"{PAPER}, eq. 5",
            params={**DIVERSITY, **STEPS, "momentum": 0.0},
            stochastic=True,
        ),
        AttackSpec(
            name="di2/m-di2-fgsm",
            make="robplug_di2.attack:MomentumDiverseFGSM",
            summary="the same with momentum; its special cases are MI-FGSM, I-FGSM and FGSM",
            source=f"{PAPER}, eq. 7",
            params={**DIVERSITY, **STEPS, "momentum": 1.0},
            stochastic=True,
        ),
        AttackSpec(
            name="di2/d-cw",
            make="robplug_di2.carlini:DiverseCarliniWagner",
            summary="C&W in l2, whose loss is seen on diverse inputs",
            source=f"{PAPER}; Carlini and Wagner 2017, section VI.A",
            params={
                **DIVERSITY,
                "steps": 250,
                "step_size": 0.01,
                "confidence": 0.0,
                "binary_search_steps": 5,
                "initial_const": 0.01,
            },
            norms=("l2",),
            budget="minimal",
            stochastic=True,
        ),
    ]

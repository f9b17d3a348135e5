"""What robplug-advprop offers to the host."""

from __future__ import annotations

from robplug import DefenseSpec, hookimpl

PAPER = "Xie et al. 2020, Adversarial Examples Improve Image Recognition"
PARAMS = {"eps": 4 / 255, "attack": "pgd", "steps": None, "step_size": 1 / 255, "average": False}


@hookimpl
def robplug_defenses() -> list[DefenseSpec]:
    """The paper's training, and its control."""
    return [
        DefenseSpec(
            name="advprop/advprop",
            make="robplug_advprop.defense:AdvProp",
            summary="clean and adversarial samples, each with batch norm of their own",
            source=f"{PAPER}, section 4, algorithm 1",
            params=PARAMS,
            pieces=("prepare", "objective", "finish"),
        ),
        DefenseSpec(
            name="advprop/vanilla",
            make="robplug_advprop.defense:VanillaMixing",
            summary="the control: the same samples through one batch norm",
            source=f"{PAPER}, eq. 3",
            params=PARAMS,
            pieces=("objective",),
        ),
    ]

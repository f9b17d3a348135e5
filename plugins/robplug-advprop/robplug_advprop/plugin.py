"""What robplug-advprop offers to the host."""

from __future__ import annotations

from robplug import DefenseSpec, hookimpl

ADVPROP = "Xie et al. 2020, Adversarial Examples Improve Image Recognition"
INTRIGUING = "Xie and Yuille 2020, Intriguing Properties of Adversarial Training at Scale"
ATTACK = {"attack": "pgd", "steps": None, "step_size": 1 / 255}
MIXING = {**ATTACK, "eps": 4 / 255, "goal": "untargeted", "clean_ratio": 1.0, "average": False}


@hookimpl
def robplug_defenses() -> list[DefenseSpec]:
    """Both papers' training, their controls, and what they do to batch norm besides."""
    return [
        DefenseSpec(
            name="advprop/advprop",
            make="robplug_advprop.defense:AdvProp",
            summary="clean and adversarial samples, each with batch norm of their own",
            source=f"{ADVPROP}, section 4, algorithm 1",
            params={**MIXING, "keep": "main"},
            pieces=("prepare", "objective", "finish"),
        ),
        DefenseSpec(
            name="advprop/fine-grained",
            make="robplug_advprop.fine_grained:FineGrained",
            summary="clean samples and several changed copies, each with batch norm of their own",
            source=f"{ADVPROP}, sections 4.2 and 5.4",
            params={**ATTACK, "sources": [2 / 255, 4 / 255], "average": False, "keep": "main"},
            pieces=("prepare", "objective", "finish"),
        ),
        DefenseSpec(
            name="advprop/mixture",
            make="robplug_advprop.defense:Mixture",
            summary="adversarial training with mixture batch norm",
            source=f"{INTRIGUING}, sections 3 and 4.2",
            params={**MIXING, "eps": 16 / 255, "steps": 30, "goal": "random", "average": True, "keep": 1},
            pieces=("prepare", "objective", "finish"),
        ),
        DefenseSpec(
            name="advprop/vanilla",
            make="robplug_advprop.defense:VanillaMixing",
            summary="the control: the same samples through one batch norm",
            source=f"{ADVPROP}, eq. 3",
            params=MIXING,
            pieces=("objective",),
        ),
        DefenseSpec(
            name="advprop/running-statistics",
            make="robplug_advprop.protocols:RunningStatistics",
            summary="training by running statistics, for the last epochs",
            source=f"{INTRIGUING}, section 4.3",
            pieces=("prepare", "mode"),
        ),
        DefenseSpec(
            name="advprop/batch-norm-only",
            make="robplug_advprop.protocols:BatchNormOnly",
            summary="fine-tuning of batch norm alone",
            source=f"{INTRIGUING}, section 4.4",
            pieces=("prepare", "finish"),
        ),
        DefenseSpec(
            name="advprop/group-norm",
            make="robplug_advprop.protocols:GroupNormControl",
            summary="the control that knows no batch: group norm for batch norm",
            source=f"{INTRIGUING}, section 4.2",
            params={"groups": 32},
            pieces=("prepare",),
        ),
    ]

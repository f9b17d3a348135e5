"""What robplug-dag offers to the host."""

from __future__ import annotations

from robplug import AttackSpec, NormSpec, hookimpl

PAPER = "Xie et al. 2017, Adversarial Examples for Semantic Segmentation and Object Detection"

NORMS = ("dag/perceptibility", "linf", "l2")
DESCENT = {"gamma": None, "rule": "label", "permutation": None}


@hookimpl
def robplug_attacks() -> list[AttackSpec]:
    """Algorithm 1 on pixels and on proposals."""
    return [
        AttackSpec(
            name="dag/segmentation",
            make="robplug_dag.attack:SegmentationAdversary",
            summary="every labelled pixel is to change its class",
            source=f"{PAPER}, Algorithm 1",
            params={**DESCENT, "steps": 200},
            tasks=("segmentation",),
            norms=NORMS,
            budget="minimal",
            targeted=False,
            stochastic=True,
        ),
        AttackSpec(
            name="dag/detection",
            make="robplug_dag.attack:DetectionAdversary",
            summary="every proposal that stands for an object is to change its class",
            source=f"{PAPER}, Algorithm 1 and section 2.3.2 of the dissertation",
            params={**DESCENT, "steps": 150, "nms_threshold": 0.9, "positive": 0.1, "refresh": None},
            tasks=("detection",),
            norms=NORMS,
            budget="minimal",
            targeted=False,
            stochastic=True,
        ),
    ]


@hookimpl
def robplug_norms() -> list[NormSpec]:
    """How visible a perturbation is."""
    return [
        NormSpec(
            name="dag/perceptibility",
            make="robplug_dag.norm:PERCEPTIBILITY",
            summary="root of the mean over pixels of the squared change of a pixel",
            source=f"{PAPER} (2.3.5 in the dissertation)",
        ),
    ]

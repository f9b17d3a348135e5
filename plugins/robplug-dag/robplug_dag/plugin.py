"""What robplug-dag offers to the host."""

from __future__ import annotations

from robplug import NormSpec, hookimpl

PAPER = "Xie et al. 2017, Adversarial Examples for Semantic Segmentation and Object Detection"


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

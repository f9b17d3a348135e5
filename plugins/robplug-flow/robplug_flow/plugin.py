"""What robplug-flow offers to the host."""

from __future__ import annotations

from robplug import AttackSpec, DefenseSpec, NormSpec, hookimpl

PAPER = "Xia and Li 2020, Improving Resistance to Adversarial Deformations by Regularizing Gradients"
NORMS = ("flow", "flow-normalized")


@hookimpl
def robplug_norms() -> list[NormSpec]:
    """The size of a flow in two units."""
    return [
        NormSpec(
            name="flow",
            make="robplug_flow.norm:FLOW",
            summary="largest displacement of a pixel along an axis",
            unit="pixels",
        ),
        NormSpec(
            name="flow-normalized",
            make="robplug_flow.norm:FLOW_NORMALIZED",
            summary="largest displacement in the paper's coordinates",
            source=f"{PAPER}, section 5.3 (budget 0.01)",
            unit="half sides of the image: (H - 1)/2 and (W - 1)/2 pixels",
        ),
    ]


@hookimpl
def robplug_attacks() -> list[AttackSpec]:
    """The paper's four attacks."""
    return [
        AttackSpec(
            name="flow/single-step",
            make="robplug_flow.attack:SingleStep",
            summary="one signed step of the flow, eps long",
            source=f"{PAPER}, section 5.2, eq. 1",
            norms=NORMS,
        ),
        AttackSpec(
            name="flow/multi-step",
            make="robplug_flow.attack:MultiStep",
            summary="signed steps of the flow from several starts",
            source=f"{PAPER}, section 5.2, eq. 2",
            params={
                "steps": 20,
                "step_size": None,
                "random_start": False,
                "restarts": 2,
                "early_stop": True,
                "ladder": [],
            },
            norms=NORMS,
            stochastic=True,
        ),
    ]

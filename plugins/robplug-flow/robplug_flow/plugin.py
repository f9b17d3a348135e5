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
        AttackSpec(
            name="flow/stadv",
            make="robplug_flow.stadv:StAdv",
            summary="the smoothest flow that changes the class",
            source=f"{PAPER}, section 5.2; Xiao et al. 2018, eq. 2-4",
            params={
                "tau": 0.1,
                "unit": "normalized",
                "kappa": 0.5,
                "neighbours": "adjacent",
                "optimizer": "sgd",
                "steps": 300,
                "step_size": 0.25,
            },
            norms=NORMS,
            budget="minimal",
        ),
        AttackSpec(
            name="flow/gradient-free",
            make="robplug_flow.gradient_free:GradientFree",
            summary="evolution strategy over flows, on scores alone",
            source=f"{PAPER}, section 5.2",
            params={
                "queries": 2000,
                "population": 20,
                "sigma": 0.5,
                "step_size": 0.1,
                "tau": 0.0,
            },
            norms=NORMS,
            needs="scores",
            stochastic=True,
        ),
    ]


@hookimpl
def robplug_defenses() -> list[DefenseSpec]:
    """The paper's defences."""
    return [
        DefenseSpec(
            name="flow/fgr",
            make="robplug_flow.defense:FlowGradientRegularization",
            summary="penalty on the squared flow gradient",
            source=f"{PAPER}, eq. 11",
            params={
                "strength": 400 / 128**2,
                "normalisation": "sample",
                "unit": "normalized",
                "gradient": "exact",
                "rho": 1e-3,
            },
            pieces=("prepare", "objective", "penalty"),
        ),
        DefenseSpec(
            name="flow/igr",
            make="robplug_flow.defense:InputGradientRegularization",
            summary="penalty on the input gradient",
            source=f"{PAPER}, eq. 5; Ross and Doshi-Velez 2018",
            params={"strength": 3000 / 128**2, "normalisation": "sample", "squared": True},
            pieces=("penalty",),
        ),
        DefenseSpec(
            name="flow/adt",
            make="robplug_flow.defense:DeformationTraining",
            summary="training on multi-step flow examples",
            source=f"{PAPER}, section 5.3",
            params={"eps": 0.01, "norm": "flow-normalized", "steps": 7, "step_size": None, "random_start": False},
            pieces=("objective",),
        ),
        DefenseSpec(
            name="flow/random-flow",
            make="robplug_flow.defense:RandomFlow",
            summary="a random flow on every training image",
            source="the authors' code",
            params={"sigma": 0.01, "unit": "normalized"},
            pieces=("augment",),
        ),
    ]

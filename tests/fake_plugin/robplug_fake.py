"""One of everything that a plugin can offer."""

from __future__ import annotations

from robplug import AttackSpec, DatasetSpec, DefenseSpec, NormSpec, TargetSpec, hookimpl


@hookimpl
def robplug_attacks():
    return [
        AttackSpec(
            name="fake/step",
            make="robplug_fake_parts:Step",
            summary="one signed step",
            params={"share": 0.5},
            norms=("linf", "half"),
        )
    ]


@hookimpl
def robplug_defenses():
    make = "robplug_fake_parts:Decay"
    return [DefenseSpec(name="fake/decay", make=make, summary="l2", params={"strength": 0.1}, pieces=("penalty",))]


@hookimpl
def robplug_targets():
    return [
        TargetSpec(name="fake/line", make="robplug_fake_parts:line", summary="a linear model", params={"classes": 3}),
        TargetSpec(
            name="fake/function", make="robplug_fake_parts:from_line", accepts=("robplug_fake_parts.Line",), summary="f"
        ),
    ]


@hookimpl
def robplug_datasets():
    return [DatasetSpec(name="fake", make="robplug_fake_parts:data", summary="noise", params={"split": "test"})]


@hookimpl
def robplug_norms():
    return [NormSpec(name="half", make="robplug_fake_parts:HALF", summary="half of linf")]

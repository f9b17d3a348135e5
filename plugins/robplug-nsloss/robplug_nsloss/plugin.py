"""What robplug-nsloss offers to the host."""

from __future__ import annotations

from typing import Any

from robplug import AttackSpec, DefenseSpec, hookimpl

PAPER = "Fidel et al. 2020, Adversarial Robustness via Stochastic Regularization of Neural Activation Sensitivity"
SEARCH = {
    "steps": 1000,
    "step_size": 0.01,
    "confidence": 0.0,
    "binary_search_steps": 9,
    "initial_const": 1e-3,
    "abort_early": True,
}

MNIST: dict[str, dict[str, Any]] = {
    "nsloss": {
        "strength": 2.0,
        "radius": 1.0,
        "draws": 5,
        "layers": None,
        "clip": False,
        "frozen_batch_norm": True,
    },
    "jacobian": {"strength": 0.01, "projections": 1, "frozen_batch_norm": True},
}
MNIST["combined"] = {**MNIST["nsloss"], "jacobian_strength": 0.01, "projections": 1}

CIFAR10: dict[str, dict[str, Any]] = {
    "nsloss": {"strength": 10.0, "radius": 3.0, "draws": 10},
    "jacobian": {"strength": 0.1},
    "combined": {"strength": 10.0, "radius": 3.0, "draws": 10, "jacobian_strength": 0.01},
}
"""What differs from the settings for MNIST, which are the defaults."""

MADE = {"nsloss": "NsLoss", "jacobian": "JacobianRegularization", "combined": "Combined"}
PIECES = {"nsloss": ("prepare", "penalty", "mode"), "jacobian": ("penalty", "mode")}
SUMMARIES = {
    "nsloss": "penalty on the change of activations under noise",
    "jacobian": "penalty on the Jacobian of the logits",
    "combined": "both penalties",
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


@hookimpl
def robplug_defenses() -> list[DefenseSpec]:
    """The paper's three defences, each also with the settings of its table I."""
    return [
        DefenseSpec(
            name=f"nsloss/{method}{suffix}",
            make=f"robplug_nsloss.defense:{made}",
            summary=SUMMARIES[method] + said,
            source=f"{PAPER}, section III, table I",
            params={**MNIST[method], **changes.get(method, {})},
            pieces=PIECES.get(method, PIECES["nsloss"]),
        )
        for method, made in MADE.items()
        for suffix, changes, said in (
            ("", {}, ""),
            ("@mnist", {}, ", as for MNIST in the paper"),
            ("@cifar10", CIFAR10, ", as for CIFAR-10 in the paper"),
        )
    ]

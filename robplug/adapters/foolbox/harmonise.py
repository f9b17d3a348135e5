"""Canonical attacks in the parameters of Foolbox, which are in units of the data as canonical ones are."""

from __future__ import annotations

from typing import Any

from robplug import canonical
from robplug.attacks import radius
from robplug.errors import PlanError
from robplug.types import ThreatModel


def fgsm(settings: canonical.FGSM, threat: ThreatModel) -> dict[str, Any]:
    """FastGradientAttack."""
    return {"random_start": False}


def pgd(settings: canonical.PGD, threat: ThreatModel) -> dict[str, Any]:
    """ProjectedGradientDescentAttack; there are no restarts."""
    if settings.restarts != 1:
        _refuse("restarts", settings.restarts, "its PGD starts once; set restarts = 1, or run several seeds")
    return {**_steps(settings, threat), "random_start": settings.random_start}


def bim(settings: canonical.BIM, threat: ThreatModel) -> dict[str, Any]:
    """BasicIterativeAttack."""
    return {**_steps(settings, threat), "random_start": False}


def mi_fgsm(settings: canonical.MIFGSM, threat: ThreatModel) -> dict[str, Any]:
    """MomentumIterativeFastGradientMethod."""
    return {**_steps(settings, threat, share=1.0), "random_start": False, "momentum": settings.decay}


def deepfool(settings: canonical.DeepFool, threat: ThreatModel) -> dict[str, Any]:
    """DeepFoolAttack on the logits of all classes."""
    return {"steps": settings.steps, "overshoot": settings.overshoot, "candidates": None, "loss": "logits"}


def cw(settings: canonical.CW, threat: ThreatModel) -> dict[str, Any]:
    """L2CarliniWagnerAttack, which takes all of its steps."""
    return {
        "steps": settings.steps,
        "stepsize": settings.step_size,
        "confidence": settings.confidence,
        "binary_search_steps": settings.binary_search_steps,
        "initial_const": settings.initial_const,
        "abort_early": False,
    }


def boundary(settings: canonical.Boundary, threat: ThreatModel) -> dict[str, Any]:
    """BoundaryAttack."""
    return {"steps": settings.steps}


def hop_skip_jump(settings: canonical.HopSkipJump, threat: ThreatModel) -> dict[str, Any]:
    """HopSkipJumpAttack."""
    return {
        "steps": settings.steps,
        "initial_gradient_eval_steps": settings.initial_evals,
        "max_gradient_eval_steps": settings.max_evals,
    }


def _steps(
    settings: canonical.PGD | canonical.BIM | canonical.MIFGSM, threat: ThreatModel, share: float = 2.5
) -> dict[str, Any]:
    """Translates steps and step size; None is ``share`` * eps / steps."""
    step_size = share * radius(threat) / settings.steps if settings.step_size is None else settings.step_size
    return {"steps": settings.steps, "abs_stepsize": step_size}


def _refuse(name: str, value: object, remedy: str) -> None:
    raise PlanError("", f"foolbox cannot honour {name} = {value!r}: {remedy}")

"""Canonical attacks in the parameters of torchattacks, whose lengths are on the scale [0, 1]."""

from __future__ import annotations

from typing import Any

from robplug import canonical
from robplug.attacks import radius
from robplug.errors import PlanError
from robplug.types import ThreatModel


def fgsm(settings: canonical.FGSM, threat: ThreatModel) -> dict[str, Any]:
    """FGSM has no parameters."""
    return {}


def pgd(settings: canonical.PGD, threat: ThreatModel) -> dict[str, Any]:
    """PGD for linf, PGDL2 for l2; there are no restarts."""
    if settings.restarts != 1:
        _refuse("restarts", settings.restarts, "its PGD starts once; set restarts = 1, or run several seeds")
    return {**_steps(settings, threat), "random_start": settings.random_start}


def bim(settings: canonical.BIM, threat: ThreatModel) -> dict[str, Any]:
    """BIM."""
    return _steps(settings, threat)


def mi_fgsm(settings: canonical.MIFGSM, threat: ThreatModel) -> dict[str, Any]:
    """MIFGSM."""
    return {**_steps(settings, threat, share=1.0), "decay": settings.decay}


def deepfool(settings: canonical.DeepFool, threat: ThreatModel) -> dict[str, Any]:
    """DeepFool."""
    return {"steps": settings.steps, "overshoot": settings.overshoot}


def cw(settings: canonical.CW, threat: ThreatModel) -> dict[str, Any]:
    """CW, which tries one constant and looks at no margin when it keeps the nearest sample."""
    if settings.binary_search_steps != 1:
        remedy = "its CW tries one constant; set binary_search_steps = 1, and initial_const to what you want tried"
        _refuse("binary_search_steps", settings.binary_search_steps, remedy)
    if settings.confidence != 0:
        _refuse("confidence", settings.confidence, "its CW keeps samples below the margin too; set confidence = 0")
    # the squared distance that c is weighed against shrinks with the square of the scale
    c = settings.initial_const / _scale(threat) ** 2
    return {"steps": settings.steps, "lr": settings.step_size, "kappa": 0.0, "c": c}


def apgd(settings: canonical.APGD, threat: ThreatModel) -> dict[str, Any]:
    """APGD on the cross-entropy."""
    return {"steps": settings.steps, "n_restarts": settings.restarts, "loss": "ce"}


def square(settings: canonical.Square, threat: ThreatModel) -> dict[str, Any]:
    """Square, on the margin; the start is a query that it does not count."""
    if settings.queries < 2:
        _refuse("queries", settings.queries, "expected at least 2: the stripes of the start and one square")
    return {"n_queries": settings.queries - 1, "p_init": settings.p_init, "loss": "margin"}


def _steps(
    settings: canonical.PGD | canonical.BIM | canonical.MIFGSM, threat: ThreatModel, share: float = 2.5
) -> dict[str, Any]:
    """Translates steps and step size; None is ``share`` * eps / steps."""
    step_size = share * radius(threat) / settings.steps if settings.step_size is None else settings.step_size
    return {"steps": settings.steps, "alpha": step_size / _scale(threat)}


def _scale(threat: ThreatModel) -> float:
    return threat.bounds[1] - threat.bounds[0]


def _refuse(name: str, value: object, remedy: str) -> None:
    raise PlanError("", f"torchattacks cannot honour {name} = {value!r}: {remedy}")

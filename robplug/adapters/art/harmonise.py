"""Canonical attacks in the parameters of ART.

Lengths are in units of the data on both sides. Where ART's attack is another in substance, its docstring here says so.
"""

from __future__ import annotations

from typing import Any

from robplug import canonical
from robplug.attacks import radius
from robplug.errors import PlanError
from robplug.types import ThreatModel

ALL_CLASSES = 1_000_000
"""More gradients than any network has classes: ART then takes those of all classes."""


def fgsm(settings: canonical.FGSM, threat: ThreatModel) -> dict[str, Any]:
    """FastGradientMethod; in l1 it moves one value."""
    return {"num_random_init": 0, "minimal": False}


def pgd(settings: canonical.PGD, threat: ThreatModel) -> dict[str, Any]:
    """ProjectedGradientDescentPyTorch.

    Differs: after a step ART clips to the box and then scales onto the l2 or l1 ball, others the other way round, which
    is another point wherever the box is active. In l1 a step moves one value, and it scales where others project.
    """
    if settings.restarts > 1 and not settings.random_start:
        _refuse("restarts", settings.restarts, "without random_start all of them are the same; set restarts = 1")
    starts = settings.restarts if settings.random_start else 0
    return {**_steps(settings, threat), "num_random_init": starts, "decay": None, "random_eps": False}


def bim(settings: canonical.BIM, threat: ThreatModel) -> dict[str, Any]:
    """BasicIterativeMethod."""
    return _steps(settings, threat)


def mi_fgsm(settings: canonical.MIFGSM, threat: ThreatModel) -> dict[str, Any]:
    """MomentumIterativeMethod; clips and scales in the order of ART's PGD."""
    return {**_steps(settings, threat, share=1.0), "decay": settings.decay}


def deepfool(settings: canonical.DeepFool, threat: ThreatModel) -> dict[str, Any]:
    """DeepFool on the logits of all classes.

    Differs: ART overshoots once, at the end, others at each linearisation before they look whether they are done.
    """
    return {"max_iter": settings.steps, "epsilon": settings.overshoot, "nb_grads": ALL_CLASSES}


def cw(settings: canonical.CW, threat: ThreatModel) -> dict[str, Any]:
    """CarliniL2Method.

    Differs: ART descends by line search, of which ``step_size`` is the first length tried, others by Adam.
    """
    return {
        "max_iter": settings.steps,
        "learning_rate": settings.step_size,
        "confidence": settings.confidence,
        "binary_search_steps": settings.binary_search_steps,
        "initial_const": settings.initial_const,
    }


def apgd(settings: canonical.APGD, threat: ThreatModel) -> dict[str, Any]:
    """AutoProjectedGradientDescent on the cross-entropy, with the paper's first step of 2 * eps."""
    if threat.norm == "l1":
        problem = "art cannot honour norm = 'l1' for apgd: its steps are not those of the attack's l1 variant"
        raise PlanError("", f"{problem}; use art/auto-projected-gradient-descent as shipped")
    return {
        "max_iter": settings.steps,
        "nb_random_init": settings.restarts,
        "loss_type": "cross_entropy",
        "eps_step": 2 * radius(threat),
    }


def square(settings: canonical.Square, threat: ThreatModel) -> dict[str, Any]:
    """SquareAttack on the margin; a query is an image tried, though ART asks for some of them twice.

    Differs: in l2, ART's start on images below 10 pixels is not a number, and it goes on from the clean image.
    """
    if settings.queries < 2:
        _refuse("queries", settings.queries, "expected at least 2: the stripes of the start and one square")
    if not 0 < settings.p_init < 1:
        _refuse("p_init", settings.p_init, "expected a share above 0 and below 1")
    return {"max_iter": settings.queries - 1, "p_init": settings.p_init, "nb_restarts": 1}


def boundary(settings: canonical.Boundary, threat: ThreatModel) -> dict[str, Any]:
    """BoundaryAttack.

    Differs: a step of ART tries batches of 20 images until one is adversarial, that of others one image.
    """
    return {"max_iter": settings.steps}


def hop_skip_jump(settings: canonical.HopSkipJump, threat: ThreatModel) -> dict[str, Any]:
    """HopSkipJump."""
    if settings.initial_evals > settings.max_evals:
        _refuse("initial_evals", settings.initial_evals, f"expected at most max_evals = {settings.max_evals}")
    return {"max_iter": settings.steps, "init_eval": settings.initial_evals, "max_eval": settings.max_evals}


def _steps(
    settings: canonical.PGD | canonical.BIM | canonical.MIFGSM, threat: ThreatModel, share: float = 2.5
) -> dict[str, Any]:
    """Translates steps and step size; None is ``share`` * eps / steps."""
    step_size = share * radius(threat) / settings.steps if settings.step_size is None else settings.step_size
    return {"max_iter": settings.steps, "eps_step": step_size}


def _refuse(name: str, value: object, remedy: str) -> None:
    raise PlanError("", f"art cannot honour {name} = {value!r}: {remedy}")

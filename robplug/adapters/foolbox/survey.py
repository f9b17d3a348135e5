"""Writes catalogue.json: ``python -m robplug.adapters.foolbox.survey``.

Parameters come from the classes' signatures, capabilities from the table here, which was made by reading the library.
"""

from __future__ import annotations

import importlib.metadata as metadata
import inspect
from typing import Any

import foolbox.attacks
from foolbox.attacks.base import Attack

from robplug.adapters.common import spec_name
from robplug.adapters.survey import can, write_catalogue

DECIDED = frozenset({"distance", "constraint", "max_translation", "max_rotation", "init_attack", "tensorboard"})
"""Parameters that the threat decides, and objects that no plan can name."""

REQUIRED = {("VirtualAdversarialAttack", "steps"): 1}
"""Defaults where the library has none: one power iteration, as in Miyato et al. 2015, section 3.2."""


def _gradient_descent() -> dict[str, dict[str, Any]]:
    """Returns the family of classes that exist once a norm."""
    family = {}
    for norm in ("L1", "L2", "Linf"):
        for word, canonical in (("ProjectedGradientDescent", "pgd"), ("BasicIterative", "bim")):
            family[f"{norm}{word}Attack"] = can(norm.lower(), stochastic=True, canonical=canonical)
            family[f"{norm}Adam{word}Attack"] = can(norm.lower(), stochastic=True)
        momentum = f"{norm}MomentumIterativeFastGradientMethod"
        family[momentum] = can(norm.lower(), stochastic=True, canonical="mi-fgsm")
        family[f"{norm}FastGradientAttack"] = can(norm.lower(), targeted=False, stochastic=True, canonical="fgsm")
    return family


def _noise() -> dict[str, dict[str, Any]]:
    """Returns the noises: one draw aims at nothing, repeated draws keep the first that meets the criterion."""
    family = {}
    for norm, aware, kinds in (
        ("L2", "", ("Gaussian", "Uniform")),
        ("L2", "ClippingAware", ("Gaussian", "Uniform")),
        ("Linf", "", ("Uniform",)),
    ):
        for kind in kinds:
            once, often = f"{norm}{aware}Additive{kind}Noise", f"{norm}{aware}RepeatedAdditive{kind}Noise"
            family[f"{once}Attack"] = can(norm.lower(), targeted=False, needs="labels", stochastic=True)
            family[f"{often}Attack"] = can(norm.lower(), needs="labels", stochastic=True)
    return family


_SEARCH: dict[str, Any] = {"budget": "minimal", "needs": "labels"}

# DeepFool asks the criterion only whether it is done and never moves towards a goal.
CAPABILITIES: dict[str, dict[str, Any]] = {
    **_gradient_descent(),
    **_noise(),
    "L2ContrastReductionAttack": can("l2", targeted=False, needs="labels"),
    "VirtualAdversarialAttack": can("l2", targeted=False, stochastic=True),
    "SparseL1DescentAttack": can("l1", stochastic=True),
    "GenAttack": can("linf", untargeted=False, needs="scores", stochastic=True),
    "DDNAttack": can("l2", budget="minimal", stochastic=True),
    "L2CarliniWagnerAttack": can("l2", budget="minimal", canonical="cw"),
    "NewtonFoolAttack": can("l2", budget="minimal", targeted=False),
    "EADAttack": can("l1", budget="minimal"),
    "L2DeepFoolAttack": can("l2", budget="minimal", targeted=False, canonical="deepfool"),
    "LinfDeepFoolAttack": can("linf", budget="minimal", targeted=False, canonical="deepfool"),
    "L0FMNAttack": can("l0", budget="minimal"),
    "L1FMNAttack": can("l1", budget="minimal"),
    "L2FMNAttack": can("l2", budget="minimal"),
    "LInfFMNAttack": can("linf", budget="minimal"),
    "InversionAttack": can("linf", "l2", "l1", targeted=False, **_SEARCH),
    "BinarySearchContrastReductionAttack": can("linf", "l2", "l1", **_SEARCH),
    "LinearSearchContrastReductionAttack": can("linf", "l2", "l1", **_SEARCH),
    "GaussianBlurAttack": can("linf", "l2", "l1", **_SEARCH),
    "LinearSearchBlendedUniformNoiseAttack": can("linf", "l2", "l1", stochastic=True, **_SEARCH),
    "SaltAndPepperNoiseAttack": can("l2", stochastic=True, **_SEARCH),
    "PointwiseAttack": can("l0", "l2", stochastic=True, **_SEARCH),
    "BoundaryAttack": can("l2", stochastic=True, canonical="boundary", **_SEARCH),
    "HopSkipJumpAttack": can("l2", "linf", stochastic=True, canonical="hop-skip-jump", **_SEARCH),
    "SpatialAttack": can("rotation-translation", needs="labels", stochastic=True),
}

_NUMBA = "needs the package numba, which Foolbox does not install and robplug does not depend on"
REFUSED = {
    "BinarizationRefinementAttack": "refines adversarial examples that it must be given, of a model that binarises",
    "DatasetAttack": "needs a second data set, fed to it beforehand, from which it takes its samples",
    **{f"{norm}BrendelBethgeAttack": _NUMBA for norm in ("L0", "L1", "L2", "Linfinity")},
}


def survey() -> dict[str, Any]:
    """Returns the catalogue of the installed version."""
    classes = {item.__name__: item for item in vars(foolbox.attacks).values() if _is_attack(item)}
    unknown = sorted(set(classes) ^ {*CAPABILITIES, *REFUSED})
    if unknown:
        raise LookupError(f"expected a capability or a reason for each class, got none or too many for {unknown}")
    return {
        "library": "foolbox",
        "version": metadata.version("foolbox"),
        "offered": [_offered(classes[name], flags) for name, flags in sorted(CAPABILITIES.items())],
        "refused": [{**_identity(classes[name]), "reason": reason} for name, reason in sorted(REFUSED.items())],
    }


def _is_attack(item: object) -> bool:
    return inspect.isclass(item) and issubclass(item, Attack) and not inspect.isabstract(item)


def _identity(attack: type[Any]) -> dict[str, Any]:
    return {"name": spec_name("foolbox", attack.__name__), "object": f"{attack.__module__}:{attack.__name__}"}


def _offered(attack: type[Any], flags: dict[str, Any]) -> dict[str, Any]:
    params = {}
    for name, item in inspect.signature(attack).parameters.items():
        if name not in DECIDED and item.kind not in (item.VAR_POSITIONAL, item.VAR_KEYWORD):
            required = item.default is item.empty
            params[name] = REQUIRED[attack.__name__, name] if required else item.default
    summary = " ".join((inspect.getdoc(attack) or "").partition("\n\n")[0].split())
    return {**_identity(attack), "summary": summary, "params": params, **flags}


if __name__ == "__main__":
    write_catalogue(survey())

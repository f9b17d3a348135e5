"""Writes catalogue.json: ``python -m robplug.adapters.art.survey``.

Parameters come from the classes' signatures, capabilities from the table here, which was made by reading the library.
"""

from __future__ import annotations

import importlib
import importlib.metadata as metadata
import inspect
import pkgutil
import re
from collections.abc import Iterator
from typing import Any

import art.attacks.evasion
from art.attacks.attack import EvasionAttack

from robplug.adapters.common import DISTRIBUTIONS, spec_name
from robplug.adapters.survey import can, write_catalogue

EVASION = "art.attacks.evasion"

DECIDED = frozenset(
    {"self", "classifier", "estimator", "eps", "norm", "targeted", "batch_size", "verbose", "summary_writer"}
    | {"max_translation", "max_rotation"}
    | {"adv_criterion", "loss", "mask", "attacks", "estimator_orig", "parallel_pool_size"}
)
"""Parameters that threat, target and adapter decide, and objects that no plan can name."""

OWN = {("AutoAttack", "targeted")}
"""Not the threat's: whether the targeted variants are run as well, to the same untargeted end."""


_BALL = ("linf", "l2", "l1")
_DECISION: dict[str, Any] = {"budget": "minimal", "needs": "labels", "stochastic": True}

# CarliniLInfMethod takes any other class for success, also where one is to be reached; SignOPTAttack reaches a class
# only from examples of it that it must be given.
CAPABILITIES: dict[str, dict[str, Any]] = {
    "FastGradientMethod": can(*_BALL, stochastic=True, canonical="fgsm"),
    "ProjectedGradientDescent": can(*_BALL, stochastic=True),
    "ProjectedGradientDescentNumpy": can(*_BALL, stochastic=True),
    "ProjectedGradientDescentPyTorch": can(*_BALL, stochastic=True, canonical="pgd"),
    "BasicIterativeMethod": can("linf", canonical="bim"),
    "MomentumIterativeMethod": can(*_BALL, canonical="mi-fgsm"),
    "AutoProjectedGradientDescent": can(*_BALL, stochastic=True, canonical="apgd"),
    "AutoConjugateGradient": can(*_BALL, stochastic=True),
    "RescalingAutoConjugateGradient": can(*_BALL, stochastic=True),
    "AutoAttack": can("linf", "l2", targeted=False, stochastic=True),
    "UniversalPerturbation": can(*_BALL, targeted=False, stochastic=True),
    "TargetedUniversalPerturbation": can(*_BALL, untargeted=False, stochastic=True),
    "SquareAttack": can("linf", "l2", targeted=False, needs="scores", stochastic=True, canonical="square"),
    "VirtualAdversarialMethod": can("l2", targeted=False, needs="scores", stochastic=True),
    "CarliniL2Method": can("l2", budget="minimal", canonical="cw"),
    "CarliniLInfMethod": can("linf", budget="minimal", targeted=False),
    "CarliniL0Method": can("l0", budget="minimal"),
    "DeepFool": can("l2", budget="minimal", targeted=False, canonical="deepfool"),
    "ElasticNet": can("l1", "l2", budget="minimal"),
    "NewtonFool": can("l2", budget="minimal", targeted=False),
    "SaliencyMapMethod": can("l0", budget="minimal", untargeted=False),
    "PixelAttack": can("l0", budget="minimal", needs="scores", stochastic=True),
    "ThresholdAttack": can("linf", budget="minimal", needs="scores", stochastic=True),
    "SimBA": can("l2", budget="minimal", needs="scores", stochastic=True),
    "ZooAttack": can("l2", budget="minimal", needs="scores", stochastic=True),
    "BoundaryAttack": can("l2", canonical="boundary", **_DECISION),
    "HopSkipJump": can("l2", "linf", canonical="hop-skip-jump", **_DECISION),
    "SignOPTAttack": can("l2", targeted=False, **_DECISION),
    "SpatialTransformation": can("rotation-translation", targeted=False, needs="labels"),
}

_PATCH = "paints a patch without limit, which leaves every ball by design"
_DETECTION = "other task: object detection"
_SPEECH = "other task: speech recognition"
_TENSORFLOW = "other framework: TensorFlow"
_BASE = "base class of other attacks, none of its own"
_GUIDE = "needs a guide image for each sample, whose features are imitated; no plan has any"
_NO_NORM = "no installed norm measures "

REFUSED = {
    "AdversarialPatch": _PATCH,
    "AdversarialPatchNumpy": _PATCH,
    "AdversarialPatchPyTorch": _PATCH,
    "AdversarialPatchTensorFlowV2": _TENSORFLOW,
    "AdversarialTexturePyTorch": "other task: object tracking",
    "BrendelBethgeAttack": "needs the package numba, which ART does not install and robplug does not depend on",
    "CarliniWagnerASR": _SPEECH,
    "CompositeAdversarialAttackPyTorch": _NO_NORM + "turned colours and rotations; it knows only images of 3x32x32",
    "DPatch": _DETECTION,
    "DecisionTreeAttack": "other framework: scikit-learn's decision trees",
    "FeatureAdversariesNumpy": _GUIDE,
    "FeatureAdversariesPyTorch": _GUIDE,
    "FeatureAdversariesTensorFlowV2": _TENSORFLOW,
    "FrameSaliencyAttack": "other task: video; it wraps another attack, which attacks frame after frame",
    "GRAPHITEBlackbox": _NO_NORM + "its stickers, which are optimised under camera transformations",
    "GRAPHITEWhiteboxPyTorch": _NO_NORM + "its stickers, which are optimised under camera transformations",
    "GeoDA": "calls numpy.mat, which numpy 2 removed; it reads and writes a file in the current directory, too",
    "HighConfidenceLowUncertainty": "other framework: Gaussian processes of GPy",
    "ImperceptibleASR": _SPEECH,
    "ImperceptibleASRPyTorch": _SPEECH,
    "LaserAttack": _NO_NORM + "a beam of light; base class that needs a generator of beams",
    "LaserBeamAttack": _NO_NORM + "a beam of light across the image",
    "LowProFool": "other task: tabular data; it weighs columns by their correlation with the label",
    "MalwareGDTensorFlow": "other task: malware; other framework: TensorFlow",
    "OverTheAirFlickeringPyTorch": "other task: video",
    "OverloadPyTorch": _DETECTION,
    "PixelThreshold": _BASE,
    "ProjectedGradientDescentCommon": _BASE,
    "ProjectedGradientDescentTensorFlowV2": _TENSORFLOW,
    "RobustDPatch": _DETECTION,
    "SNAL": _DETECTION,
    "ShadowAttack": _NO_NORM + "its change, which is kept smooth and colourless and not small",
    "Wasserstein": _NO_NORM + "the Wasserstein distance",
}

NOT_IMPORTABLE = {"BrendelBethgeAttack": f"{EVASION}.brendel_bethge"}
"""Classes in modules that cannot be imported without what their reason names."""


def survey() -> dict[str, Any]:
    """Returns the catalogue of the installed version."""
    places = {attack.__name__: attack.__module__ for attack in _classes()} | NOT_IMPORTABLE
    unknown = sorted(set(places) ^ {*CAPABILITIES, *REFUSED})
    if unknown:
        raise LookupError(f"expected a capability or a reason for each class, got none or too many for {unknown}")
    return {
        "library": "art",
        "version": metadata.version(DISTRIBUTIONS["art"]),
        "offered": [_offered(name, places[name], flags) for name, flags in sorted(CAPABILITIES.items())],
        "refused": [{**_identity(name, places[name]), "reason": reason} for name, reason in sorted(REFUSED.items())],
    }


def _classes() -> Iterator[type[Any]]:
    """Yields the evasion attacks of all modules: the package itself exports only some."""
    for found in pkgutil.walk_packages(art.attacks.evasion.__path__, f"{EVASION}."):
        if found.name not in NOT_IMPORTABLE.values():
            for item in vars(importlib.import_module(found.name)).values():
                if inspect.isclass(item) and issubclass(item, EvasionAttack) and item.__module__ == found.name:
                    yield item


def _identity(name: str, module: str) -> dict[str, Any]:
    return {"name": spec_name("art", name), "object": f"{module}:{name}"}


def _offered(name: str, module: str, flags: dict[str, Any]) -> dict[str, Any]:
    attack = getattr(importlib.import_module(module), name)
    params = {
        key: item.default
        for key, item in inspect.signature(attack.__init__).parameters.items()
        if key not in DECIDED or (name, key) in OWN
    }
    text = " ".join((inspect.getdoc(attack) or "").partition("\n\n")[0].partition("|")[0].split())
    summary = re.split(r"(?<=\.) (?=[A-Z])", text)[0]
    return {**_identity(name, module), "summary": summary, "params": params, **flags}


if __name__ == "__main__":
    write_catalogue(survey())

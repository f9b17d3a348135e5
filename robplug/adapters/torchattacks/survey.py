"""Writes catalogue.json: ``python -m robplug.adapters.torchattacks.survey``.

Parameters come from the classes' signatures, capabilities from the table here, which was made by reading the library.
"""

from __future__ import annotations

import importlib.metadata as metadata
import inspect
from typing import Any

import torchattacks

from robplug.adapters.common import spec_name
from robplug.adapters.survey import can, write_catalogue

DECIDED = frozenset({"self", "model", "eps", "max_epsilon", "norm", "n_classes", "seed", "verbose"})
"""Parameters that threat, target and seed decide."""


# An attack that takes no radius is "minimal": what it finds is judged by its distance. FAB takes a radius and drops
# what lies beyond; its targeted mode confuses goals with labels (it attacks only samples predicted as the goal). JSMA
# without a goal aims at label + 1 modulo 10 whatever the number of classes, so it is offered with goals only.
CAPABILITIES: dict[str, dict[str, Any]] = {
    "GN": can("l2", budget="minimal", targeted=False, needs="labels", stochastic=True),
    "FGSM": can("linf", canonical="fgsm"),
    "BIM": can("linf", canonical="bim"),
    "RFGSM": can("linf", stochastic=True),
    "PGD": can("linf", stochastic=True, canonical="pgd"),
    "EOTPGD": can("linf", stochastic=True),
    "FFGSM": can("linf", stochastic=True),
    "TPGD": can("linf", targeted=False, stochastic=True),
    "MIFGSM": can("linf", canonical="mi-fgsm"),
    "UPGD": can("linf", stochastic=True),
    "APGD": can("linf", "l2", targeted=False, stochastic=True, canonical="apgd"),
    "APGDT": can("linf", "l2", targeted=False, stochastic=True),
    "DIFGSM": can("linf", stochastic=True),
    "TIFGSM": can("linf", stochastic=True),
    "Jitter": can("linf", stochastic=True),
    "NIFGSM": can("linf"),
    "PGDRS": can("linf", stochastic=True),
    "SINIFGSM": can("linf"),
    "VMIFGSM": can("linf", stochastic=True),
    "VNIFGSM": can("linf", stochastic=True),
    "SPSA": can("linf", needs="scores", stochastic=True),
    "PIFGSM": can("linf", targeted=False),
    "PIFGSMPP": can("linf"),
    "CW": can("l2", budget="minimal", canonical="cw"),
    "PGDL2": can("l2", stochastic=True, canonical="pgd"),
    "PGDRSL2": can("l2", stochastic=True),
    "DeepFool": can("l2", budget="minimal", targeted=False, canonical="deepfool"),
    "EADEN": can("l1", "l2", budget="minimal"),
    "EADL1": can("l1", budget="minimal"),
    "SparseFool": can("l0", budget="minimal", targeted=False),
    "OnePixel": can("l0", budget="minimal", needs="scores", stochastic=True),
    "Pixle": can("l0", budget="minimal", needs="scores", stochastic=True),
    "JSMA": can("l0", budget="minimal", untargeted=False),
    "FAB": can("linf", "l2", targeted=False, stochastic=True),
    "AutoAttack": can("linf", "l2", targeted=False, stochastic=True),
    "Square": can("linf", "l2", needs="scores", stochastic=True, canonical="square"),
}

REFUSED = {
    "VANILA": "no attack: it returns the samples unchanged",
    "MultiAttack": "wrapper class: it takes a list of attacks, as a plan does, whose worst case is the same",
    "LGV": "wrapper class: it trains copies of the model on a data loader of its own before it attacks",
}


def survey() -> dict[str, Any]:
    """Returns the catalogue of the installed version."""
    classes = {name: getattr(torchattacks, name) for name in torchattacks.__all__}
    unknown = sorted(set(classes) ^ {*CAPABILITIES, *REFUSED})
    if unknown:
        raise LookupError(f"expected a capability or a reason for each class, got none or too many for {unknown}")
    return {
        "library": "torchattacks",
        "version": metadata.version("torchattacks"),
        "offered": [_offered(classes[name], flags) for name, flags in sorted(CAPABILITIES.items())],
        "refused": [{**_identity(classes[name]), "reason": reason} for name, reason in sorted(REFUSED.items())],
    }


def _identity(attack: type[Any]) -> dict[str, Any]:
    return {
        "name": spec_name("torchattacks", attack.__name__),
        "object": f"{attack.__module__}:{attack.__name__}",
    }


def _offered(attack: type[Any], flags: dict[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(attack).parameters
    params = {name: item.default for name, item in signature.items() if name not in DECIDED}
    summary = " ".join((inspect.getdoc(attack) or "").partition("[http")[0].partition("\n\n")[0].split())
    return {**_identity(attack), "summary": summary, "params": params, **flags}


if __name__ == "__main__":
    write_catalogue(survey())

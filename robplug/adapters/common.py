"""What the three adapters share: reading a committed catalogue and making attack classes from it.

A catalogue lists every evasion attack of a library: those offered, with parameters and capabilities, and those not,
with the reason. It is read without importing the library.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata as metadata
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from robplug.errors import InputError, RobplugError, ThreatError
from robplug.types import AttackSpec, ThreatModel

DISTRIBUTIONS = {"art": "adversarial-robustness-toolbox", "foolbox": "foolbox", "torchattacks": "torchattacks"}


@functools.cache
def catalogue(library: str) -> dict[str, Any]:
    """Returns the committed catalogue of a library: its version, and the entries ``offered`` and ``refused``."""
    path = Path(__file__).parent / library / "catalogue.json"
    return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def attack_specs(library: str) -> list[AttackSpec]:
    """Returns the Specs of a library's offered attacks."""
    return [_spec(library, entry) for entry in catalogue(library)["offered"]]


def _spec(library: str, entry: Mapping[str, Any]) -> AttackSpec:
    canonical = entry["canonical"]
    return AttackSpec(
        name=entry["name"],
        make=f"robplug.adapters.{library}.inward:{class_name(entry)}",
        summary=entry["summary"],
        source=entry["object"],
        params=entry["params"],
        norms=tuple(entry["norms"]),
        budget=entry["budget"],
        targeted=entry["targeted"],
        untargeted=entry["untargeted"],
        needs=entry["needs"],
        stochastic=entry["stochastic"],
        canonical=canonical,
        harmonise=canonical and f"robplug.adapters.{library}.harmonise:{canonical.replace('-', '_')}",
    )


def class_name(entry: Mapping[str, Any]) -> str:
    """Returns the name of the library's class."""
    return str(entry["object"]).rpartition(":")[2]


def spec_name(library: str, name: str) -> str:
    """Returns the robplug name of a library's class: without "Attack", in kebab case.

    Example:
        >>> spec_name("foolbox", "LinfProjectedGradientDescentAttack")
        'foolbox/linf-projected-gradient-descent'
        >>> spec_name("torchattacks", "PGDL2")
        'torchattacks/pgdl2'
    """
    words = re.sub(r"Attack$", "", name).replace("PyTorch", "Pytorch")
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", words)
    return f"{library}/{words.lower()}"


def make_attack_class(library: str, name: str, base: type[Any]) -> type[Any]:
    """Makes the frozen dataclass of one catalogue entry: its fields are the library's own parameters.

    Args:
        library: such as ``"art"``.
        name: name of the library's class.
        base: the adapter's attack class; gets ``entry`` and, resolved on use, ``foreign``.

    Raises:
        AttributeError: the catalogue has no such class.
        RobplugError: the installed library is of another version and its class has other parameters.
    """
    entry = next((entry for entry in catalogue(library)["offered"] if class_name(entry) == name), None)
    if entry is None:
        raise AttributeError(f"the catalogue of {library} offers no {name}")
    foreign = _import_checked(library, entry)
    fields = [(key, Any, _field(value)) for key, value in entry["params"].items()]
    namespace = {"entry": entry, "foreign": foreign, "__doc__": entry["summary"], "__module__": base.__module__}
    return dataclasses.make_dataclass(name, fields, bases=(base,), frozen=True, namespace=namespace)


def _field(value: Any) -> Any:
    if isinstance(value, list | dict):
        return dataclasses.field(default_factory=functools.partial(json.loads, json.dumps(value)))
    return dataclasses.field(default=value)


def _import_checked(library: str, entry: Mapping[str, Any]) -> type[Any]:
    module, _, name = str(entry["object"]).partition(":")
    foreign: type[Any] = getattr(importlib.import_module(module), name)
    if other_version(library):
        known = inspect.signature(foreign.__init__).parameters
        gone = [key for key in entry["params"] if key not in known]
        if gone:
            raise RobplugError(
                f"{entry['name']} of {library} {metadata.version(DISTRIBUTIONS[library])} has no parameter "
                f"{', '.join(gone)}; install {library} {catalogue(library)['version']}"
            )
    return foreign


def other_version(library: str) -> str:
    """Returns a sentence if the installed version is not the catalogue's, else ""."""
    made_for = catalogue(library)["version"]
    try:
        here = metadata.version(DISTRIBUTIONS[library])
    except metadata.PackageNotFoundError:
        return ""
    return "" if here == made_for else f"{library} {here} is installed; the catalogue was made with {made_for}"


def check_exportable(spec: AttackSpec, library: str, tasks: Sequence[str] = ("classification",)) -> None:
    """Refuses an attack that a library has no models for, or that must be fitted to data first.

    Args:
        spec: of the attack.
        library: name of the library, for the message.
        tasks: what it has models for.

    Raises:
        ThreatError: the attack serves none of these tasks.
        InputError: it is fitted to a data set.
    """
    if not set(spec.tasks) & set(tasks):
        has, wants = " and ".join(tasks), " and ".join(spec.tasks)
        raise ThreatError(
            f"expected an attack on {has}, all that {library} has models for, got {spec.name} on {wants}; "
            "use robplug.evaluate"
        )
    if spec.scope != "sample":
        raise InputError("an attack of single samples", f"{spec.name}, which is fitted to data", "use robplug.evaluate")


class ForeignAttack:
    """Base of the attack classes made from a catalogue."""

    entry: ClassVar[Mapping[str, Any]]
    foreign: ClassVar[type[Any]]

    def check_serves(self, threat: ThreatModel) -> None:
        """Refuses a threat whose norm or goal the library's attack does not know.

        Raises:
            ThreatError: it does not.
        """
        name, norms = self.entry["name"], self.entry["norms"]
        if threat.norm not in norms:
            raise ThreatError(f"expected a norm that {name} serves ({', '.join(norms)}), got {threat.norm}")
        if not self.entry["targeted" if threat.targeted else "untargeted"]:
            raise ThreatError(f"expected a threat that {name} serves, got targeted={threat.targeted}")

    def params(self) -> dict[str, Any]:
        """Returns the library's own parameters."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}  # type: ignore[arg-type]

"""The Registry: the Specs of all working plugins, and what they name."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from robplug.errors import InputError, PlanError, RobplugError, UnknownNameError
from robplug.types import Attack, AttackSpec, DatasetSpec, DefenseSpec, NormSpec, Spec, TargetSpec, ThreatModel

if TYPE_CHECKING:
    from robplug.data import Dataset
    from robplug.norms import Norm
    from robplug.plugins import Plugin
    from robplug.targets import Target

KINDS: dict[str, tuple[str, type[Spec]]] = {
    "attack": ("robplug_attacks", AttackSpec),
    "defense": ("robplug_defenses", DefenseSpec),
    "target": ("robplug_targets", TargetSpec),
    "dataset": ("robplug_datasets", DatasetSpec),
    "norm": ("robplug_norms", NormSpec),
}
"""Kind of thing: its hook and the class of its Specs."""


class Registry:
    """Looks up Specs by name and makes what they name.

    Args:
        plugins: as found by `robplug.plugins.load`, broken ones included.
    """

    def __init__(self, plugins: Sequence[Plugin]) -> None:
        self.plugins = tuple(plugins)
        self._specs: dict[str, dict[str, Spec]] = {
            kind: {spec.name: spec for plugin in plugins for spec in plugin.specs if isinstance(spec, spec_class)}
            for kind, (_, spec_class) in KINDS.items()
        }

    def specs(self, kind: str) -> list[Any]:
        """Returns all Specs of a kind, sorted by name."""
        return [self._specs[kind][name] for name in sorted(self._specs[kind])]

    def spec(self, kind: str, name: str) -> Any:
        """Returns one Spec.

        Raises:
            UnknownNameError: there is none; the error lists near matches and names a disabled plugin that may have it.
        """
        spec = self._specs[kind].get(name)
        if spec is None:
            near = difflib.get_close_matches(name.lower(), self._specs[kind], n=3)
            raise UnknownNameError(kind, name, near, self._why_missing(name))
        return spec

    def owner(self, spec: Spec) -> Plugin:
        """Returns the plugin that offers this Spec."""
        return next(plugin for plugin in self.plugins if any(own is spec for own in plugin.specs))

    def attack(self, name: str, **params: Any) -> Attack:
        """Makes an attack from its name and parameters."""
        return self._build("attack", name, params)  # type: ignore[no-any-return]

    def defense(self, name: str, **params: Any) -> Any:
        """Makes a defence from its name and parameters."""
        return self._build("defense", name, params)

    def dataset(self, name: str, **params: Any) -> Dataset:
        """Loads a data set."""
        return self._build("dataset", name, params)  # type: ignore[no-any-return]

    def norm(self, name: str) -> Norm:
        """Returns a norm."""
        return resolve(self.spec("norm", name))  # type: ignore[no-any-return]

    def named_target(self, name: str, *of: Target, **params: Any) -> Any:
        """Makes a target (or an nn.Module) that is listed by name.

        Args:
            name: as listed.
            *of: the targets that it is made of.
            **params: its parameters.

        Raises:
            InputError: the name is of what turns other objects into targets; too few or too many targets, or a
                parameter that it does not have.
        """
        spec = self.spec("target", name)
        if spec.accepts:
            classes = " or ".join(accepted.rpartition(".")[2] for accepted in spec.accepts)
            remedy = "name a network, or an object of your own: file.py:object (make= in a plan's target)"
            raise InputError("a network", f"{name}, which turns an object of the class {classes} into a target", remedy)
        fits, wanted = {
            "none": (len(of) == 0, "no target"),
            "one": (len(of) == 1, "exactly one target"),
            "several": (len(of) > 0, "one or more targets"),
        }[spec.of]
        if not fits:
            raise InputError(f"{wanted} in `of` for {name}", len(of))
        return self._build("target", name, params, *of)

    def target(self, model: Any, **options: Any) -> Target:
        """Turns an object into a Target through the plugin that accepts its class, or a base of it; a Target is one.

        Raises:
            InputError: no installed plugin accepts it, or it is a Target and there are options.
        """
        from robplug.targets import Target

        if isinstance(model, Target):
            if options:
                raise InputError(
                    "no options for a Target, which has its own", options, "dataclasses.replace changes them"
                )
            return model
        by_class = {accepted: spec for spec in self.specs("target") for accepted in spec.accepts}
        for base in type(model).__mro__:
            spec = by_class.get(f"{base.__module__}.{base.__qualname__}")
            if spec is not None:
                return resolve(spec)(model, **options)  # type: ignore[no-any-return]
        known = ", ".join(sorted(name.rpartition(".")[2] for name in by_class))
        raise InputError(f"a model of one of the classes {known}", f"a {type(model).__qualname__}")

    def harmonised(
        self, canonical: str, library: str, params: dict[str, Any], threat: ThreatModel
    ) -> tuple[AttackSpec, dict[str, Any]]:
        """Compiles a canonical attack for one library.

        Args:
            canonical: such as ``"pgd"``.
            library: origin of the implementation, such as ``"art"``.
            params: canonical parameters that differ from their defaults.
            threat: the threat model; its norm chooses among implementations, its eps may enter the parameters.

        Returns:
            The Spec of the library's attack and its own parameters.

        Raises:
            PlanError: the library has no such attack for this norm, or cannot honour a parameter.
        """
        settings = canonical_settings(canonical, params)
        own = [spec for spec in self.specs("attack") if spec.canonical == canonical and spec.origin == library]
        fitting = [spec for spec in own if threat.norm in spec.norms]
        if not fitting:
            norms = sorted({norm for spec in own for norm in spec.norms})
            has = f"only for {', '.join(norms)}" if norms else "not at all"
            known = {spec.origin for spec in self.specs("attack")}
            if library not in known:
                near = difflib.get_close_matches(library.lower(), known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}"
                missing = self._why_missing(library) or f"no plugin of that name is installed; {hint}"
                raise PlanError("", f"no attacks of {library!r}: {missing}")
            raise PlanError("", f"{library} has the attack {canonical!r} {has}, and the threat is {threat.norm}")
        spec = fitting[0]
        if spec.harmonise is None:
            return spec, dict(vars(settings))
        return spec, resolve_path(spec.harmonise)(settings, threat)

    def canonical_libraries(self, canonical: str, norm: str) -> list[str]:
        """Returns the libraries that have a canonical attack for a norm."""
        specs = self.specs("attack")
        return sorted({spec.origin for spec in specs if spec.canonical == canonical and norm in spec.norms})

    def _build(self, kind: str, name: str, params: dict[str, Any], *of: Target) -> Any:
        spec = self.spec(kind, name)
        check_params(spec, params)
        return resolve(spec)(*of, **{**spec.params, **params})

    def _why_missing(self, name: str) -> str:
        """Returns which disabled plugin has this name, or might have it, and why it is disabled."""
        origin = name.partition("/")[0]
        broken = [plugin for plugin in self.plugins if plugin.error]
        sure = [plugin for plugin in broken if name in plugin.claimed]
        likely = [plugin for plugin in broken if plugin.distribution in (origin, f"robplug-{origin}")]
        # what a plugin offers is not known if it failed before its hooks could be asked
        silent = [plugin for plugin in broken if not plugin.claimed]
        return "; ".join(
            f"{plugin.distribution} ({plugin.module}) is disabled: {plugin.error.problem}; {plugin.error.remedy}"
            for plugin in sure or likely or silent
            if plugin.error
        )


def check_params(spec: Spec, params: dict[str, Any]) -> None:
    """Refuses parameters that a Spec does not have, naming near ones."""
    for key in params:
        if key not in spec.params:
            near = difflib.get_close_matches(key, spec.params, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(spec.params) or 'none'}"
            raise InputError(f"a parameter of {spec.name}", repr(key), hint)


def canonical_settings(canonical: str, params: dict[str, Any]) -> Any:
    """Returns the canonical dataclass of an attack with these parameters."""
    from robplug.canonical import CANONICAL

    if canonical not in CANONICAL:
        near = difflib.get_close_matches(canonical.lower(), CANONICAL, n=3)
        raise UnknownNameError("attack", canonical, near)
    names = list(inspect.signature(CANONICAL[canonical]).parameters)
    for key in params:
        if key not in names:
            raise InputError(f"a parameter of {canonical}", repr(key), f"it has {', '.join(names)}")
    return CANONICAL[canonical](**params)


def resolve(spec: Spec) -> Any:
    """Imports what a Spec names.

    Raises:
        RobplugError: it cannot be imported, often because an optional library is missing.
    """
    return resolve_path(spec.make)


def resolve_path(path: str) -> Any:
    """Imports ``module:object``."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        missing = error.name or str(error)
        extra = {"art": "art", "foolbox": "foolbox", "eagerpy": "foolbox", "torchattacks": "torchattacks"}
        root = missing.partition(".")[0]
        remedy = f"pip install 'robplug[{extra[root]}]'" if root in extra else f"pip install {root}"
        raise RobplugError(f"{path} needs the package {missing}, which is not installed: {remedy}") from error
    except AttributeError as error:
        raise RobplugError(f"{path} cannot be resolved: {error}") from error
    except RobplugError:
        raise
    except (Exception, SystemExit) as error:  # foreign code at import may raise anything
        raise RobplugError(f"importing {module} failed: {type(error).__name__}: {error}") from error

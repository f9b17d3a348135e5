"""Finding plugins and looking things up in them.

Entry points are loaded here and not by pluggy, whose loader drops the second of two entry points with one name
in silence and lets one broken import stop all. A plugin is known by its distribution; a broken one is disabled
alone, and whatever is asked of it later is answered with the reason.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata as metadata
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, get_args

import pluggy
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from robplug import hookspecs
from robplug.errors import PluginError
from robplug.registry import KINDS, Registry
from robplug.types import AttackSpec, Budget, DatasetSpec, Needs, NormSpec, Scope, Spec, TargetSpec

HOST = "robplug"
BUILT_IN = (
    "robplug.builtin",
    "robplug.adapters.art.plugin",
    "robplug.adapters.foolbox.plugin",
    "robplug.adapters.torchattacks.plugin",
    "robplug.vision.plugin",
)

NAME = re.compile(r"[a-z0-9]+([-.][a-z0-9]+)*(/[a-z0-9]+([-.][a-z0-9]+)*)?(@[a-z0-9-]+)?")


@dataclass(frozen=True)
class Plugin:
    """One plugin as it was found.

    Attributes:
        distribution: name of the pip distribution, ``"robplug"`` for what is built in.
        version: its version.
        module: the module that its entry point names.
        specs: what it offers; empty if it is disabled.
        error: why it is disabled, or None.
        claimed: names it would have offered, known even if it is disabled for one of them.
    """

    distribution: str
    version: str
    module: str
    specs: tuple[Spec, ...] = ()
    error: PluginError | None = None
    claimed: frozenset[str] = field(default_factory=frozenset)


@functools.cache
def registry() -> Registry:
    """Returns the installed plugins; they are looked for once per process."""
    return Registry(load())


def load() -> list[Plugin]:
    """Loads the built-in plugins, then the installed ones in the order of their distributions' names."""
    manager = pluggy.PluginManager(hookspecs.GROUP)
    manager.add_hookspecs(hookspecs)
    plugins: list[Plugin] = []
    owners: dict[tuple[str, str], str] = {}
    for found in (*_built_in(), *_installed()):
        plugin = _admit(manager, found, owners)
        plugins.append(plugin)
        owners.update(dict.fromkeys(_claims(plugin.specs), plugin.distribution))
    return plugins


@dataclass(frozen=True)
class _Found:
    """An entry point that has not been imported."""

    distribution: str
    version: str
    module: str
    requires: tuple[str, ...]
    load: Callable[[], Any]


def _built_in() -> Iterator[_Found]:
    version = metadata.version(HOST)
    for module in BUILT_IN:
        yield _Found(HOST, version, module, (), functools.partial(importlib.import_module, module))


def _installed() -> Iterator[_Found]:
    """Yields the entry points of the installed distributions, by name; the first of two with one name, as imports."""
    first: dict[str, metadata.Distribution] = {}
    for dist in metadata.distributions():
        # other people's broken metadata are none of our business, so only what names our group is looked into
        if f"[{hookspecs.GROUP}]" in (dist.read_text("entry_points.txt") or ""):
            first.setdefault(_name(dist), dist)
    for name in sorted(first):
        yield from _entry_points(name, first[name])


def _name(dist: metadata.Distribution) -> str:
    try:
        return canonicalize_name(dist.name)
    except Exception:  # METADATA is missing or damaged
        return "unknown"


def _entry_points(name: str, dist: metadata.Distribution) -> list[_Found]:
    try:
        entry_points = sorted(dist.entry_points.select(group=hookspecs.GROUP), key=lambda entry: entry.name)
        requires, version = tuple(dist.requires or ()), dist.version or "unknown"
    except Exception as error:  # metadata that cannot be parsed
        return [_Found(name, "", "entry_points.txt", (), functools.partial(_raise, error))]
    return [_Found(name, version, entry.value, requires, entry.load) for entry in entry_points]


def _raise(error: Exception) -> None:
    raise error


def _admit(manager: pluggy.PluginManager, found: _Found, owners: dict[tuple[str, str], str]) -> Plugin:
    """Loads one plugin; whatever is wrong with it becomes its error."""
    plugin = functools.partial(Plugin, found.distribution, found.version, found.module)
    claimed: frozenset[str] = frozenset()
    try:
        _check_host_version(found)
        module = _import(found)
        specs = tuple(_collect(manager, found, module))
        claimed = frozenset(spec.name for spec in specs)
        _check_owners(found, specs, owners)
        return plugin(specs=specs, claimed=claimed)
    except PluginError as error:
        return plugin(error=error, claimed=claimed)


def _check_host_version(found: _Found) -> None:
    here = metadata.version(HOST)
    for text in found.requires:
        try:
            need = Requirement(text)
        except InvalidRequirement as error:
            problem = f"its requirement {text!r} cannot be read: {_one_line(error)}"
            raise PluginError(found.distribution, problem, _blame(found)) from error
        applies = need.marker is None or need.marker.evaluate({"extra": ""})
        if canonicalize_name(need.name) == HOST and applies and not need.specifier.contains(here, prereleases=True):
            raise PluginError(
                found.distribution,
                f"it was made for robplug {need.specifier}, and {here} is installed",
                f"pip install --upgrade {found.distribution} robplug",
            )


def _blame(found: _Found) -> str:
    return f"report it to the authors of {found.distribution}"


def _import(found: _Found) -> ModuleType:
    try:
        module = found.load()
    except (Exception, SystemExit) as error:  # whatever a plugin does on import must not stop the host
        raise PluginError(
            found.distribution,
            f"importing {found.module} failed: {type(error).__name__}: {_one_line(error)}",
            f"reinstall or remove it: pip uninstall {found.distribution}",
        ) from error
    if not isinstance(module, ModuleType):
        problem = f"its entry point {found.module} is a {type(module).__name__}, expected a module"
        raise PluginError(found.distribution, problem, _blame(found))
    return module


def _collect(manager: pluggy.PluginManager, found: _Found, module: ModuleType) -> Iterator[Spec]:
    """Registers the module and yields the Specs of its hooks, all of them checked."""
    _check_marked(found, module)
    try:
        manager.register(module, name=f"{found.distribution}:{found.module}")
        manager.check_pending()
    except (pluggy.PluginValidationError, ValueError) as error:
        if manager.is_registered(module):
            manager.unregister(module)
        hooks = ", ".join(hook for hook, _ in KINDS.values())
        raise PluginError(found.distribution, _one_line(error), f"the hooks are {hooks}, without arguments") from error
    for hook, spec_class in KINDS.values():
        for implementation in getattr(manager.hook, hook).get_hookimpls():
            if implementation.plugin is module:
                yield from _call(found, hook, implementation.function, spec_class)


def _check_marked(found: _Found, module: ModuleType) -> None:
    for name in vars(module):
        if name.startswith("robplug_") and callable(vars(module)[name]):
            if getattr(vars(module)[name], f"{hookspecs.GROUP}_impl", None) is None:
                raise PluginError(found.distribution, f"{name} is not marked", "put @robplug.hookimpl above it")


def _call(found: _Found, hook: str, function: Callable[[], Any], spec_class: type[Spec]) -> Iterator[Spec]:
    try:
        specs = function()
    except (Exception, SystemExit) as error:
        problem = f"{hook} raised {type(error).__name__}: {_one_line(error)}"
        raise PluginError(found.distribution, problem, _blame(found)) from error
    if not isinstance(specs, list | tuple):
        raise PluginError(found.distribution, f"{hook} returned {specs!r}, expected a list of Specs", _blame(found))
    for spec in specs:
        if not isinstance(spec, spec_class):
            problem = f"{hook} returned {spec!r}, expected a {spec_class.__name__}"
            raise PluginError(found.distribution, problem, _blame(found))
        if problem := _malformed(spec):
            raise PluginError(found.distribution, f"{hook}: {problem}", _blame(found))
        yield spec


def _malformed(spec: Spec) -> str:
    """Returns what is wrong with a Spec's values, or ""; a Spec says so itself of none of them."""
    bare = isinstance(spec, DatasetSpec | NormSpec)
    if not (isinstance(spec.name, str) and NAME.fullmatch(spec.name) and (bare or "/" in spec.name)):
        return f"name {spec.name!r} is malformed, expected 'origin/method' in lower case"
    if not (isinstance(spec.make, str) and spec.make.count(":") == 1):
        return f"make {spec.make!r} of {spec.name} is malformed, expected 'module:object'"
    if not isinstance(spec.params, Mapping):
        return f"params {spec.params!r} of {spec.name} is no mapping from names to defaults"
    if isinstance(spec, AttackSpec):
        for key in ("norms", "tasks"):  # a lone string would pass for a tuple of its letters
            value = getattr(spec, key)
            if not (isinstance(value, tuple) and value and all(isinstance(item, str) for item in value)):
                return f"{key} {value!r} of {spec.name} is malformed, expected a tuple of names"
        for key, words in (("budget", Budget), ("needs", Needs), ("scope", Scope)):
            if getattr(spec, key) not in get_args(words):
                expected = ", ".join(get_args(words))
                return f"{key} {getattr(spec, key)!r} of {spec.name} is malformed, expected one of {expected}"
    return ""


def _check_owners(found: _Found, specs: tuple[Spec, ...], owners: dict[tuple[str, str], str]) -> None:
    taken = dict(owners)
    for key in _claims(specs):
        if key in taken:
            problem = f"it claims the {key[0]} {key[1]!r}, which {taken[key]} has"
            raise PluginError(found.distribution, problem, f"pip uninstall {found.distribution}, or the other")
        taken[key] = found.distribution


def _claims(specs: Iterable[Spec]) -> Iterator[tuple[str, str]]:
    """Yields what only one plugin can have: names, and classes of models."""
    for spec in specs:
        yield kind_of(spec), spec.name
        if isinstance(spec, TargetSpec):
            yield from (("model class", accepted) for accepted in spec.accepts)


def kind_of(spec: Spec) -> str:
    """Returns "attack", "defense", "target", "dataset" or "norm"."""
    return next(kind for kind, (_, spec_class) in KINDS.items() if isinstance(spec, spec_class))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())

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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pluggy
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from robplug import hookspecs
from robplug.errors import PluginError
from robplug.registry import KINDS, Registry
from robplug.types import Spec

HOST = "robplug"
BUILT_IN = (
    "robplug.builtin",
    "robplug.adapters.art.plugin",
    "robplug.adapters.foolbox.plugin",
    "robplug.adapters.torchattacks.plugin",
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
        owners.update({(kind_of(spec), spec.name): plugin.distribution for spec in plugin.specs})
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


def _installed() -> list[_Found]:
    found = {}
    for dist in metadata.distributions():
        for entry_point in dist.entry_points.select(group=hookspecs.GROUP):
            key = (canonicalize_name(dist.name), entry_point.name, entry_point.value)
            requires = tuple(dist.requires or ())
            found[key] = _Found(key[0], dist.version, entry_point.value, requires, entry_point.load)
    return [found[key] for key in sorted(found)]


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
        need = Requirement(text)
        if canonicalize_name(need.name) == HOST and not need.specifier.contains(here, prereleases=True):
            raise PluginError(
                found.distribution,
                f"it was made for robplug {need.specifier}, and {here} is installed",
                f"pip install --upgrade {found.distribution} robplug",
            )


def _import(found: _Found) -> Any:
    try:
        return found.load()
    except (Exception, SystemExit) as error:  # whatever a plugin does on import must not stop the host
        raise PluginError(
            found.distribution,
            f"importing {found.module} failed: {type(error).__name__}: {error}",
            f"reinstall or remove it: pip uninstall {found.distribution}",
        ) from error


def _collect(manager: pluggy.PluginManager, found: _Found, module: Any) -> Iterator[Spec]:
    """Registers the module and yields the Specs of its hooks, all of them checked."""
    fix = f"report it to the authors of {found.distribution}"
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
                yield from _call(found, hook, implementation.function, spec_class, fix)


def _check_marked(found: _Found, module: Any) -> None:
    for name in vars(module):
        if name.startswith("robplug_") and callable(vars(module)[name]):
            if getattr(vars(module)[name], f"{hookspecs.GROUP}_impl", None) is None:
                raise PluginError(found.distribution, f"{name} is not marked", "put @robplug.hookimpl above it")


def _call(found: _Found, hook: str, function: Callable[[], Any], spec_class: type[Spec], fix: str) -> Iterable[Spec]:
    try:
        specs = function()
    except Exception as error:
        raise PluginError(found.distribution, f"{hook} raised {type(error).__name__}: {error}", fix) from error
    if not isinstance(specs, list | tuple):
        raise PluginError(found.distribution, f"{hook} returned {specs!r}, expected a list of Specs", fix)
    for spec in specs:
        if not isinstance(spec, spec_class):
            problem = f"{hook} returned {spec!r}, expected a {spec_class.__name__}"
            raise PluginError(found.distribution, problem, fix)
        if not NAME.fullmatch(spec.name) or spec.make.count(":") != 1:
            problem = f"{hook}: name {spec.name!r} or make {spec.make!r} is malformed"
            raise PluginError(found.distribution, problem, "expected 'origin/method' and 'module:object'")
    return list(specs)


def _check_owners(found: _Found, specs: tuple[Spec, ...], owners: dict[tuple[str, str], str]) -> None:
    taken = dict(owners)
    for spec in specs:
        key = (kind_of(spec), spec.name)
        if key in taken:
            problem = f"it claims the {key[0]} {spec.name!r}, which {taken[key]} has"
            raise PluginError(found.distribution, problem, f"pip uninstall {found.distribution}, or the other")
        taken[key] = found.distribution


def kind_of(spec: Spec) -> str:
    """Returns "attack", "defense", "target", "dataset" or "norm"."""
    return next(kind for kind, (_, spec_class) in KINDS.items() if isinstance(spec, spec_class))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

"""Making the models and data of a plan, and digests of what they are."""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.metadata as metadata
import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robplug.data import Dataset
from robplug.errors import InputError, PlanError, RobplugError
from robplug.referee.cells import Cell, Identity
from robplug.referee.plan_tables import DatasetEntry, TargetEntry
from robplug.registry import Registry
from robplug.targets import Target
from robplug.types import TargetSpec

HOST = "robplug"
LIBRARIES = {"art": "adversarial-robustness-toolbox", "foolbox": "foolbox", "torchattacks": "torchattacks"}
"""Origins of attacks whose numbers depend on a library: its distribution."""


@dataclass(frozen=True)
class Model:
    """A model of a plan, and what it is.

    Attributes:
        target: ready to be attacked.
        weights: digest of its parameters and buffers.
        source: digest of what it computes beside them.
    """

    target: Target
    weights: str
    source: str


def make_dataset(entry: DatasetEntry, registry: Registry, where: str) -> Dataset:
    """Loads the data of a plan."""
    both = {"split", "root"} & entry.params.keys()
    if both:
        raise PlanError(f"{where}: dataset {entry.name}.params", f"{both.pop()} is a key of the table itself")
    params = {**entry.params, "split": entry.split, **({"root": entry.root} if entry.root else {})}
    try:
        dataset = registry.dataset(entry.name, **params)
    except RobplugError as error:
        raise PlanError(f"{where}: dataset {entry.name}", str(error)) from error
    if not len(dataset):
        raise PlanError(f"{where}: dataset {entry.name}", "it has no samples")
    if entry.samples is not None and entry.samples > len(dataset):
        raise PlanError(f"{where}: dataset {entry.name}.samples", f"{entry.samples} asked for, it has {len(dataset)}")
    return dataset if entry.samples is None else dataset.head(entry.samples)


def make_target(
    entry: TargetEntry,
    dataset: Dataset,
    registry: Registry,
    where: str,
    device: str,
    members: Sequence[Target] = (),
) -> Target:
    """Makes a model of a plan and loads its weights.

    Args:
        entry: the plan's entry.
        dataset: whose bounds and task are the model's where the entry names none.
        registry: the installed plugins.
        where: path of the plan.
        device: where it is to be.
        members: the targets that it is made of.

    Raises:
        PlanError: it cannot be made; the message names the target.
    """
    try:
        if len(members) != len(entry.of or ()):
            raise InputError("of only in the targets of a plan that attacks", entry.of)
        made = _make(entry, registry, Path(where).parent, members)
        module = made.module if isinstance(made, Target) else made
        if entry.weights is not None:
            if not isinstance(module, nn.Module):
                raise InputError("an nn.Module to load weights into", type(module).__name__)
            module = copy.deepcopy(module)  # the file may give one object to several targets
            load_weights(module, _find(entry.weights, Path(where).parent))
            made = replace(made, module=module) if isinstance(made, Target) else module
        if isinstance(module, nn.Module):
            module.to(device)
        if not isinstance(made, nn.Module) and (entry.bounds or entry.stochastic):
            expected = "bounds, stochastic, eot and draws only for an nn.Module"
            raise InputError(expected, f"a {type(made).__name__}", "it brings its own")
        task = _task(entry, registry) or dataset.task
        options: dict[str, Any] = {"bounds": entry.bounds or dataset.bounds} if isinstance(made, nn.Module) else {}
        if isinstance(made, nn.Module) and task != "classification":
            options["task"] = task
        if entry.stochastic:
            options.update(stochastic=True, eot=entry.eot, draws=entry.draws)
        return registry.target(made, **options)
    except RobplugError as error:
        raise PlanError(f"{where}: target {entry.name}", str(error)) from error


def _task(entry: TargetEntry, registry: Registry) -> str | None:
    """Returns the task that the entry or the Spec of its name says, or None for a model of the user's own."""
    make = entry.make or entry.name
    named = None if ":" in make else registry.spec("target", make)
    return entry.task or (named.task if isinstance(named, TargetSpec) else None)


def _make(entry: TargetEntry, registry: Registry, folder: Path, members: Sequence[Target]) -> Any:
    make = entry.make or entry.name
    path, _, name = make.partition(":")
    if not name:
        return registry.named_target(make, *members, **entry.params)
    try:
        made = getattr(_module(path, folder), name, None)
        if made is None:
            raise InputError(f"an object {name!r} in {path}", "none")
        if members and (isinstance(made, nn.Module) or not callable(made)):
            raise InputError(f"{make} to be a function of the targets in of", f"a {type(made).__name__}")
        return made(*members, **entry.params) if callable(made) and not isinstance(made, nn.Module) else made
    except RobplugError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise InputError(
            f"{make} to make a model", f"{type(error).__name__}: {error}{_line_of(error, path)}"
        ) from error


def _line_of(error: Exception, path: str) -> str:
    """Returns where in the user's file an error came from."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(path)]
    return f" ({path}, line {lines[-1]})" if lines else ""


def _find(path: str, folder: Path) -> Path:
    """Returns a file of a plan: relative paths start at the current folder, or else at the plan's."""
    found = next((place for place in (Path(path), folder / path) if place.is_file()), None)
    if found is None:
        raise InputError(f"a file {path} here or beside the plan", "none")
    return found


def _module(path: str, folder: Path) -> Any:
    if not path.endswith(".py"):
        return importlib.import_module(path)
    found = _find(path, folder)
    content = str(found.resolve()).encode() + found.read_bytes()  # an edited file is another module
    name = f"robplug_user_{found.stem}_{hashlib.sha256(content).hexdigest()[:8]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, found)
        assert spec is not None and spec.loader is not None  # the suffix is .py
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # inspect needs it to find the source of its classes
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def load_weights(module: nn.Module, path: Path) -> None:
    """Loads weights strictly; nothing is unpickled but tensors.

    A mapping under ``state_dict`` is taken from a checkpoint, and a prefix ``module.`` that all names have is removed.

    Raises:
        InputError: the file is missing or damaged, or does not fit the module.
    """
    try:
        state = _read_weights(path)
    except Exception as error:  # the readers raise many types on damaged files
        remedy = "save it with safetensors, or as a plain state_dict"
        raise InputError(
            f"weights that load without unpickling code in {path}", f"{type(error).__name__}", remedy
        ) from error
    state = state.get("state_dict", state)
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"weights of {type(module).__name__} in {path}", " ".join(str(error).split())[:300]) from error


def _read_weights(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return dict(load_file(path))
    return dict(torch.load(path, map_location="cpu", weights_only=True))


def identify(cell: Cell, model: Model, dataset: Dataset, registry: Registry) -> Identity:
    """Returns the digests and versions that belong into a cell's key."""
    specs = (cell.spec, registry.spec("norm", cell.threat.norm))
    modules: dict[str, set[str]] = {HOST: {HOST}}
    for spec in specs:
        owner = registry.owner(spec)
        modules.setdefault(owner.distribution, set()).update((owner.module, spec.make.partition(":")[0]))
    library = LIBRARIES.get(cell.spec.origin)
    return Identity(
        weights=model.weights,
        model_source=model.source,
        data=dataset.digest,
        plugin=editable_digest(modules),
        bounds=model.target.bounds,
        offers=model.target.offers,
        draws=(model.target.stochastic, model.target.eot, model.target.draws),
        versions={name: metadata.version(name) for name in sorted({*modules, *([library] if library else [])})},
    )


def plugin_digest(entry: TargetEntry, registry: Registry) -> str:
    """Returns what changes with the plugin that makes a listed target, or "" for the host's and those in files."""
    name = entry.make or entry.name
    if ":" in name:
        return ""
    owner = registry.owner(registry.spec("target", name))
    if owner.distribution == HOST:
        return ""
    return metadata.version(owner.distribution) + editable_digest({owner.distribution: {owner.module}})


def state_digest(module: nn.Module) -> str:
    """Returns the SHA-256 of all parameters and buffers, the ones that are not saved included."""
    content = hashlib.sha256()
    for name, tensor in sorted((*module.named_parameters(), *module.named_buffers())):
        content.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        content.update(_bytes(tensor))
    return content.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def source_digest(module: nn.Module, entry: TargetEntry, where: str) -> str:
    """Returns the SHA-256 of what the model computes beside its weights.

    That is the printed structure, the parameters of ``make``, and the source files of ``make``, of all classes that
    torch does not bring, and of the functions that modules hold (a test-time defence, say).
    """
    content = hashlib.sha256(f"{module!r}{json.dumps(entry.params, sort_keys=True, default=str)}".encode())
    things: list[Any] = [cls for part in module.modules() for cls in type(part).__mro__]
    things += [value for part in module.modules() for value in vars(part).values() if inspect.isroutine(value)]
    files = {file for thing in things if not _of_torch(thing) and (file := _file_of(thing))}
    path = (entry.make or "").partition(":")[0]
    if path.endswith(".py"):
        files.add(str(_find(path, Path(where).parent)))
    # one file may be known by a relative and by an absolute path
    contents = {(file.name, file.read_bytes()) for file in (Path(name).resolve() for name in files)}
    for _, source in sorted(contents):
        content.update(source)
    return content.hexdigest()


def _of_torch(thing: Any) -> bool:
    return str(getattr(thing, "__module__", "")).partition(".")[0] in ("torch", "builtins", "typing", "abc")


def _file_of(thing: Any) -> str | None:
    try:
        return inspect.getsourcefile(thing)
    except TypeError:  # built in, or defined in an interpreter
        return None


def editable_digest(modules: dict[str, set[str]]) -> str:
    """Returns the SHA-256 of the Python files of distributions installed in editable mode, or "" if none is.

    Args:
        modules: distributions, and the modules of each that take part.
    """
    content, found = hashlib.sha256(), False
    for distribution in sorted(modules):
        text = metadata.distribution(distribution).read_text("direct_url.json")
        if text and json.loads(text).get("dir_info", {}).get("editable"):
            for root in sorted({module.partition(".")[0] for module in modules[distribution]}):
                found = True
                for name, source in _sources(root):
                    content.update(name.encode() + source)
    return content.hexdigest() if found else ""


def _sources(root: str) -> Iterator[tuple[str, bytes]]:
    """Yields name and content of the files of a top-level package or module."""
    spec = importlib.util.find_spec(root)
    assert spec is not None  # it has been imported
    for folder in spec.submodule_search_locations or ():
        for path in sorted(Path(folder).rglob("*.py")):
            yield str(path.relative_to(folder)), path.read_bytes()
    if not spec.submodule_search_locations and spec.origin:
        yield root, Path(spec.origin).read_bytes()

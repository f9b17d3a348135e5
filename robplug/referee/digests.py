"""What models, data and plugins are: digests and versions, for the keys of cells."""

from __future__ import annotations

import hashlib
import importlib.metadata as metadata
import importlib.util
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robplug.data import Dataset
from robplug.referee.cells import Cell
from robplug.referee.keys import Identity
from robplug.referee.load import Model, find_file
from robplug.referee.plan_tables import TargetEntry
from robplug.registry import Registry

HOST = "robplug"
LIBRARIES = {"art": "adversarial-robustness-toolbox", "foolbox": "foolbox", "torchattacks": "torchattacks"}
"""Origins of attacks whose numbers depend on a library: its distribution."""


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

    That is the printed structure, the object in ``make`` and its parameters, and the source files of ``make``, of all
    classes that torch does not bring, and of the functions that modules hold (a test-time defence, say).
    """
    path, _, made = (entry.make or "").partition(":")
    content = hashlib.sha256(f"{module!r}{made}{json.dumps(entry.params, sort_keys=True, default=str)}".encode())
    things: list[Any] = [cls for part in module.modules() for cls in type(part).__mro__]
    things += [value for part in module.modules() for value in vars(part).values() if inspect.isroutine(value)]
    files = {file for thing in things if not _of_torch(thing) and (file := _file_of(thing))}
    if path.endswith(".py"):
        files.add(str(find_file(path, Path(where).parent)))
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

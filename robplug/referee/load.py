"""Making the models and data of a plan, and digests of what they are."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata as metadata
import importlib.util
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robplug.data import Dataset
from robplug.errors import InputError, PlanError, RobplugError
from robplug.referee.cells import Identity
from robplug.referee.plan import DatasetEntry, TargetEntry
from robplug.registry import Registry
from robplug.targets import Target
from robplug.types import Spec

LIBRARIES = {"art": "adversarial-robustness-toolbox", "foolbox": "foolbox", "torchattacks": "torchattacks"}
"""Origins of attacks whose numbers depend on a library: its distribution."""


def make_dataset(entry: DatasetEntry, registry: Registry, where: str) -> Dataset:
    """Loads the data of a plan."""
    params = {**entry.params, "split": entry.split, **({"root": entry.root} if entry.root else {})}
    try:
        dataset = registry.dataset(entry.name, **params)
    except RobplugError as error:
        raise PlanError(f"{where}: dataset {entry.name}", str(error)) from error
    if entry.samples is not None and entry.samples > len(dataset):
        raise PlanError(f"{where}: dataset {entry.name}.samples", f"{entry.samples} asked for, it has {len(dataset)}")
    return dataset if entry.samples is None else dataset.head(entry.samples)


def make_target(entry: TargetEntry, bounds: tuple[float, float], registry: Registry, where: str, device: str) -> Target:
    """Makes a model of a plan and loads its weights.

    Raises:
        PlanError: it cannot be made; the message names the target.
    """
    try:
        made = _make(entry, registry, Path(where).parent)
        module = made.module if isinstance(made, Target) else made
        if entry.weights is not None:
            if not isinstance(module, nn.Module):
                raise InputError("an nn.Module to load weights into", type(module).__name__)
            load_weights(module, Path(entry.weights))
        if isinstance(module, nn.Module):
            module.to(device)
        if isinstance(made, Target):
            return made
        options: dict[str, Any] = {"bounds": entry.bounds or bounds} if isinstance(made, nn.Module) else {}
        if entry.stochastic:
            options.update(stochastic=True, eot=entry.eot, draws=entry.draws)
        return registry.target(made, **options)
    except RobplugError as error:
        raise PlanError(f"{where}: target {entry.name}", str(error)) from error


def _make(entry: TargetEntry, registry: Registry, folder: Path) -> Any:
    make = entry.make or entry.name
    path, _, name = make.partition(":")
    if not name:
        return registry.named_target(make, **entry.params)
    made = getattr(_module(path, folder), name, None)
    if made is None:
        raise InputError(f"an object {name!r} in {path}", "none")
    return made(**entry.params) if callable(made) and not isinstance(made, nn.Module) else made


def _module(path: str, folder: Path) -> Any:
    if not path.endswith(".py"):
        return importlib.import_module(path)
    found = next((p for p in (Path(path), folder / path) if p.is_file()), None)
    if found is None:
        raise InputError(f"a file {path} here or beside the plan", "none")
    name = f"robplug_user_{found.stem}_{hashlib.sha256(str(found.resolve()).encode()).hexdigest()[:8]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, found)
        assert spec is not None and spec.loader is not None  # the suffix is .py
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # inspect needs it to find the source of its classes
        spec.loader.exec_module(module)
    return sys.modules[name]


def load_weights(module: nn.Module, path: Path) -> None:
    """Loads weights strictly; nothing is unpickled but tensors.

    A mapping under ``state_dict`` is taken from a checkpoint, and a prefix ``module.`` that all names have is removed.

    Raises:
        InputError: the file is missing or damaged, or does not fit the module.
    """
    if not path.is_file():
        raise InputError("a file of weights", path, "check weights=; relative paths start at the current folder")
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


def identify(target: Target, dataset: Dataset, spec: Spec, registry: Registry) -> Identity:
    """Returns the digests and versions that belong into a cell's key."""
    owner = registry.owner(spec).distribution
    names = {owner, *([LIBRARIES[spec.origin]] if spec.origin in LIBRARIES else [])}
    return Identity(
        weights=state_digest(target.module),
        model_source=source_digest(target.module),
        data=dataset.digest,
        plugin=editable_digest(owner),
        bounds=target.bounds,
        versions={name: metadata.version(name) for name in sorted(names)},
    )


def state_digest(module: nn.Module) -> str:
    """Returns the SHA-256 of all parameters and buffers, the ones that are not saved included."""
    content = hashlib.sha256()
    for name, tensor in sorted((*module.named_parameters(), *module.named_buffers())):
        content.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        content.update(_bytes(tensor))
    return content.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def source_digest(module: nn.Module) -> str:
    """Returns the SHA-256 of the architecture: the printed structure, and the source of classes that torch has not."""
    classes = {type(part) for part in module.modules() if not type(part).__module__.startswith("torch.")}
    content = hashlib.sha256(repr(module).encode())
    for cls in sorted(classes, key=lambda cls: f"{cls.__module__}.{cls.__qualname__}"):
        try:
            source = inspect.getsource(cls)
        except (OSError, TypeError):  # defined in an interpreter
            source = ""
        content.update(f"{cls.__qualname__}\n{source}".encode())
    return content.hexdigest()


def editable_digest(distribution: str) -> str:
    """Returns the SHA-256 of a distribution's Python files if it is installed in editable mode, else ""."""
    text = metadata.distribution(distribution).read_text("direct_url.json")
    record = json.loads(text) if text else {}
    if not record.get("dir_info", {}).get("editable"):
        return ""
    root = Path(record["url"].removeprefix("file://"))
    package = root / distribution.replace("-", "_")
    content = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return content.hexdigest()

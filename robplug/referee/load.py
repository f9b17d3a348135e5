"""Making the models and data of a plan."""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robplug.data import Dataset
from robplug.errors import InputError, PlanError, RobplugError
from robplug.isolation import seeded_globals
from robplug.referee.plan_tables import DatasetEntry, TargetEntry
from robplug.registry import Registry
from robplug.targets import Target, evaluation_mode
from robplug.tasks import task_of
from robplug.types import TargetSpec


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
            load_weights(module, _find_weights(entry.weights, Path(where).parent, registry))
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


def count_classes(target: Target, dataset: Dataset, name: str) -> int:
    """Tries a model on a sample of its data, and returns the number of its classes.

    Args:
        target: the model.
        dataset: what it is to answer.
        name: what errors call it.

    Raises:
        PlanError: it does not fit the data: another task, samples that it does not take, or too few classes.
    """
    try:
        labels = dataset.labels(target.task)
    except InputError as error:
        raise PlanError(name, str(error)) from None
    sample = dataset.x[:1].to(device=target.device, dtype=target.sample_dtype, copy=True)
    try:
        with torch.no_grad(), evaluation_mode(target.module), seeded_globals(0):
            classes = replace(target, classes=None).count_classes(sample)
            task_of(target).answer(target, sample)
    except Exception as error:  # the user's own code may raise anything
        problem = f"does not take samples of shape {tuple(dataset.x.shape[1:])} of {dataset.name}"
        raise PlanError(name, f"{problem}: {type(error).__name__}: {error}") from error
    try:
        task_of(replace(target, classes=classes)).check(labels, dataset.x, f"labels of {dataset.name}")
    except InputError as error:
        raise PlanError(name, f"has {classes} classes: {error}") from None
    return classes


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


def find_file(path: str, folder: Path) -> Path:
    """Returns a file of a plan: relative paths start at the current folder, or else at the plan's."""
    found = next((place for place in (Path(path), folder / path) if place.is_file()), None)
    if found is None:
        raise InputError(f"a file {path} here or beside the plan", "none")
    return found


def _find_weights(path: str, folder: Path, registry: Registry) -> Path:
    """Returns the file of weights; the name of a network, which has its own, is not one."""
    try:
        return find_file(path, folder)
    except InputError:
        if path not in [spec.name for spec in registry.specs("target")]:
            raise
        remedy = f'begin with it by model = "{path}" in a training plan, make = "{path}" in a target'
        raise InputError("a file of weights", f"{path}, a network", remedy) from None


def _module(path: str, folder: Path) -> Any:
    if not path.endswith(".py"):
        return importlib.import_module(path)
    found = find_file(path, folder)
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

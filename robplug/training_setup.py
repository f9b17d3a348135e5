"""What a training needs before its first step: rows, device, optimizer; and what makes it another than others."""

from __future__ import annotations

import dataclasses
import importlib.metadata as metadata
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from robplug.data import Dataset
from robplug.defenses import Defense, Stack
from robplug.errors import InputError, RobplugError
from robplug.plugins import registry
from robplug.tasks import TASKS
from robplug.training_plan import Options

if TYPE_CHECKING:
    from lightning_fabric import Fabric

SCHEMA_VERSION = 1
_PLAIN = (str, int, float, bool, type(None))


def sub_seed(seed: int, *path: str | int) -> int:
    """Returns a seed for one use; different uses get unrelated ones."""
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in path]
    return int(np.random.SeedSequence([seed, *words]).generate_state(1, np.uint64)[0])


def check_data(dataset: Dataset, options: Options, stack: Stack) -> None:
    """Refuses data that cannot be trained on, and patience without anything to score."""
    if len(dataset) == 0:
        raise InputError("a data set with samples", f"{dataset.name} without any")
    labels = torch.float32 if dataset.task == "detection" else torch.int64
    if not dataset.x.is_floating_point() or dataset.y.dtype != labels:
        expected = f"x of a floating-point dtype and y of {str(labels).removeprefix('torch.')}"
        raise InputError(expected, f"{dataset.x.dtype} and {dataset.y.dtype}")
    TASKS[dataset.task](None).check(dataset.y, dataset.x)
    if stack.patience is not None and not options.held_out:
        remedy = "pass held_out=0.1, say, or patience=None"
        raise InputError("held-out samples to stop early by", "held_out=0", remedy)


def check_task(model: nn.Module, dataset: Dataset, options: Options, stack: Stack) -> None:
    """Refuses defences that say that they do not serve the data's task, and detectors that cannot be trained.

    What a defence that no plugin offers serves is its user's business.
    """
    serves = {spec.make: spec for spec in registry().specs("defense")}
    for defense in stack.defenses:
        spec = serves.get(f"{type(defense).__module__}:{type(defense).__qualname__}")
        if spec is not None and dataset.task not in spec.tasks:
            raise InputError(
                f"defences that serve {dataset.task}", f"{spec.name}, which serves {', '.join(spec.tasks)}"
            )
    if dataset.task != "detection":
        return
    if not callable(getattr(model, "losses", None)):
        raise InputError("a detector with losses(x, y), for data with boxes", type(model).__name__)
    if options.held_out:
        raise InputError("held_out=0 for detection, which is not scored while it is trained", options.held_out)


def split_rows(count: int, options: Options) -> tuple[Tensor, Tensor]:
    """Returns the rows to train on and the rows held out, both ascending.

    Raises:
        InputError: one of them would be empty.
    """
    generator = torch.Generator().manual_seed(sub_seed(options.seed, "held out"))
    held = round(options.held_out * count)
    if options.held_out and not 0 < held < count:
        raise InputError(f"held_out that leaves some of {count} samples on both sides", options.held_out)
    order = torch.randperm(count, generator=generator)
    return order[held:].sort().values, order[:held].sort().values


def make_fabric(options: Options) -> Fabric:
    """Returns Fabric on one device.

    Raises:
        RobplugError: Lightning Fabric is not installed.
        InputError: there is no such device.
    """
    try:
        from lightning_fabric import Fabric
    except ModuleNotFoundError as error:
        message = "training needs the package lightning-fabric, which is not installed: pip install 'robplug[train]'"
        raise RobplugError(message) from error
    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise InputError("device to be auto, cpu, cuda or cuda:N", repr(options.device))
    if kind == "cuda" and torch.cuda.device_count() <= int(index or 0):
        raise InputError(f"a CUDA device for {name}", f"{torch.cuda.device_count()} of them", "device='cpu'")
    return Fabric(accelerator=kind, devices=[int(index or 0)] if kind == "cuda" else 1, precision=options.precision)


def make_optimizer(model: nn.Module, stack: Stack, options: Options) -> torch.optim.Optimizer:
    """Returns the optimizer of the model's parameters and of those that defences announced."""
    exempt = {id(parameter) for parameter in stack.no_decay}
    parameters = list(dict.fromkeys((*model.parameters(), *stack.new_parameters)))
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in parameters if id(parameter) not in exempt]},
        {"params": [parameter for parameter in parameters if id(parameter) in exempt], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if options.optimizer == "adam":
        return torch.optim.Adam(groups, lr=options.lr or 1e-3, weight_decay=options.weight_decay)
    return torch.optim.SGD(groups, options.lr or 0.1, options.momentum, weight_decay=options.weight_decay)


def identity(
    model: nn.Module, options: Options, defenses: Sequence[Defense], dataset: Dataset, origin: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns what makes a training another than others."""
    return {
        "model": _class_name(model),
        **options.model_dump(exclude={"device"}),
        "defenses": [_describe(defense) for defense in defenses],
        "data": dataset.digest,
        "origin": dict(origin),
    }


def _describe(defense: Defense) -> dict[str, Any]:
    """Returns the name of a defence's class and its parameters; what is no JSON value as text."""
    params = dataclasses.asdict(defense) if dataclasses.is_dataclass(defense) else vars(defense)
    plain = {key: value if isinstance(value, _PLAIN) else repr(value) for key, value in params.items()}
    return {"class": _class_name(defense), **plain}


def _class_name(thing: object) -> str:
    return f"{type(thing).__module__}:{type(thing).__qualname__}"


def versions() -> dict[str, Any]:
    """Returns the versions that a record carries."""
    return {"schema_version": SCHEMA_VERSION, "robplug": metadata.version("robplug"), "torch": str(torch.__version__)}


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Returns what differs between two records, ours first, or ""."""
    keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    return ", ".join(f"{key} = {theirs.get(key)!r} and not {ours.get(key)!r}" for key in keys)

"""Keeping what foreign code does to global state from lasting: random numbers, and the model it is handed."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def seeded_globals(seed: int) -> Iterator[None]:
    """Seeds the global generators of torch, CUDA, numpy and random, and gives them their states back afterwards.

    Args:
        seed: any number >= 0; each generator takes as many bits of it as it can.
    """
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    states = (torch.get_rng_state(), np.random.get_state(), random.getstate())
    cuda_states = torch.cuda.get_rng_state_all() if cuda else []
    torch.manual_seed(seed % (1 << 63))
    np.random.seed(seed % (1 << 32))
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)


def global_numbers() -> tuple[object, ...]:
    """Returns the states of the global generators on the CPU, to be compared with those of another moment."""
    legacy = np.random.get_state(legacy=False)
    assert isinstance(legacy, dict)  # legacy=False
    numbers = legacy["state"]
    return (torch.get_rng_state().numpy().tobytes(), numbers["key"].tobytes(), numbers["pos"], random.getstate())


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Inside, torch works with this many threads on the CPU; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class _Saved:
    tensor: Tensor
    value: Tensor
    requires_grad: bool
    grad: Tensor | None


@dataclass(frozen=True)
class _Container:
    """A dict or set as it is now; put back into the same object, by the methods of its own class."""

    value: Any
    content: Any

    @classmethod
    def of(cls, value: Any) -> _Container:
        return cls(value, type(value)(value))

    def restore(self) -> bool:
        """Returns whether it had changed."""
        if isinstance(self.value, dict):
            same = list(self.value) == list(self.content) and all(
                self.value[k] is self.content[k] for k in self.content
            )
        else:
            same = self.value == self.content
        if not same:
            self.value.clear()
            self.value.update(self.content)
        return not same


@dataclass(frozen=True)
class _Part:
    """One module of a model: its class, and all that it holds, by identity."""

    name: str
    module: nn.Module
    kind: type[nn.Module]
    attributes: dict[str, Any]
    containers: dict[str, _Container]
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, name: str, module: nn.Module) -> _Part:
        attributes = dict(vars(module))
        # of exactly these types, whose methods are what they seem
        containers = {k: _Container.of(v) for k, v in attributes.items() if type(v) in (dict, OrderedDict, set)}
        tensors = {k: v.detach().clone() for k, v in attributes.items() if isinstance(v, Tensor)}
        return cls(name or "the model", module, type(module), attributes, containers, tensors)

    def restore_attributes(self) -> list[str]:
        changes = []
        if type(self.module) is not self.kind:
            changes.append(f"class of {self.name}")
            self.module.__class__ = self.kind
        now = vars(self.module)
        keys = [key for key in {**now, **self.attributes} if key != "training"]  # modes are looked at elsewhere
        changed = [key for key in keys if now.get(key, now) is not self.attributes.get(key, now)]
        for key in changed:
            now.pop(key, None)
        now.update({key: self.attributes[key] for key in changed if key in self.attributes})
        changes += [f"attribute {key} of {self.name}" for key in changed]
        for key, value in self.tensors.items():
            if not _same(self.attributes[key].detach(), value):
                changes.append(f"attribute {key} of {self.name}")
                self.attributes[key].data = value
        return changes

    def restore_containers(self) -> list[str]:
        changes = []
        for key, container in self.containers.items():
            if container.restore():
                changes.append(f"{key.strip('_').replace('_', ' ')} of {self.name}")
        return changes


class _Classes:
    """The methods and attributes of the classes that a model is made of, PyTorch's among them."""

    def __init__(self, module: nn.Module) -> None:
        kinds = {kind for part in module.modules() for kind in type(part).__mro__ if kind is not object}
        self._before = {kind: dict(vars(kind)) for kind in kinds}

    def restore(self) -> list[str]:
        changes = []
        for kind, before in self._before.items():
            now = dict(vars(kind))
            for key in {**now, **before}:
                if key in before and now.get(key, before) is not before[key]:
                    changes.append(f"{key} of the class {kind.__name__}")
                    setattr(kind, key, before[key])
                elif key not in before and callable(now[key]):
                    changes.append(f"{key} of the class {kind.__name__}")
                    delattr(kind, key)
        return changes


class ModuleState:
    """What a module is and holds at one moment, and the hooks of all modules.

    Of each part: mode, parameters, buffers, parts and hooks; of each tensor: value, ``requires_grad`` and ``.grad``.

    Args:
        module: looked at now, and put back by `restore`.
        strict: also its class, the methods of that class, and every attribute: for code that is not trusted. A model
            that counts its own calls forgets those made meanwhile. Patches of PyTorch's functions are not undone.
    """

    def __init__(self, module: nn.Module, strict: bool = False) -> None:
        self._module = module
        self._modes = {name: part.training for name, part in module.named_modules()}
        self._classes = _Classes(module) if strict else None
        self._parts = [_Part.of(name, part) for name, part in module.named_modules()]
        hooks = vars(torch.nn.modules.module)
        self._global_hooks = {
            name: _Container.of(hooks[name]) for name in hooks if name.startswith("_global") and "hooks" in name
        }
        named = (*module.named_parameters(), *module.named_buffers())
        self._saved = {
            name: _Saved(tensor, tensor.detach().clone(), tensor.requires_grad, _copy(tensor.grad))
            for name, tensor in named
        }

    def restore(self) -> list[str]:
        """Puts everything back.

        Returns:
            What had changed, such as ``"buffer or parameter bn.running_mean"``; empty if nothing had.
        """
        changes = self._classes.restore() if self._classes else []
        for part in self._parts if self._classes else ():
            changes += part.restore_attributes()
        for part in self._parts:
            changes += part.restore_containers()
        for name, hooks in self._global_hooks.items():
            if hooks.restore():
                changes.append(f"hooks of all modules ({name.strip('_').replace('_', ' ')})")
        for name, part in self._module.named_modules():
            if part.training != self._modes.get(name, part.training):
                changes.append(f"mode of {name or 'the model'}")
                part.training = self._modes[name]
        for name, saved in self._saved.items():
            changes += _restore_tensor(name, saved)
        return changes


def _restore_tensor(name: str, saved: _Saved) -> list[str]:
    tensor, changes = saved.tensor, []
    if not _same(tensor.detach(), saved.value):
        changes.append(f"buffer or parameter {name}")
        with torch.no_grad():
            tensor.data = saved.value.clone()
    if tensor.requires_grad != saved.requires_grad:
        changes.append(f"requires_grad of {name}")
        tensor.requires_grad_(saved.requires_grad)
    if not _same(tensor.grad, saved.grad):
        changes.append(f".grad of {name}")
        tensor.grad = _copy(saved.grad)
    return changes


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())

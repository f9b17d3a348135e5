"""Keeping what foreign code does to global state from lasting: random numbers, and the model it is handed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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


_HELD = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
"""What a module holds: objects that may be replaced, added or left behind."""
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")


@dataclass(frozen=True)
class _Part:
    name: str
    module: nn.Module
    kind: type[nn.Module]
    held: dict[str, dict[str, object]]
    callables: dict[str, object]

    @classmethod
    def of(cls, name: str, module: nn.Module) -> _Part:
        held = {held: dict(getattr(module, held)) for held in _HELD}
        return cls(name or "the model", module, type(module), held, _callables(module))

    def restore(self) -> list[str]:
        changes = []
        if type(self.module) is not self.kind:
            changes.append(f"class of {self.name}")
            self.module.__class__ = self.kind
        callables, attributes = _callables(self.module), vars(self.module)
        for key in {**callables, **self.callables}:
            if callables.get(key) is not self.callables.get(key):
                changes.append(f"attribute {key} of {self.name}")
                attributes.pop(key, None)
        attributes.update(self.callables)
        for held, before in self.held.items():
            now = attributes[held]
            if list(now) != list(before) or any(now[key] is not value for key, value in before.items()):
                changes.append(f"{held.strip('_').replace('_', ' ')} of {self.name}")
                now.clear()
                now.update(before)
        return changes


def _callables(module: nn.Module) -> dict[str, object]:
    return {key: value for key, value in vars(module).items() if callable(value)}


class ModuleState:
    """What a module is and holds at one moment, and the hooks of all modules.

    Of each part: class, mode, parameters, buffers, parts, hooks, and callable attributes, such as a ``forward`` that
    was put in front of the class's; of each tensor: value, ``requires_grad`` and ``.grad``.

    Args:
        module: looked at now, and put back by `restore`.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._modes = {name: part.training for name, part in module.named_modules()}
        self._parts = [_Part.of(name, part) for name, part in module.named_modules()]
        self._global_hooks = {name: dict(getattr(torch.nn.modules.module, name)) for name in _GLOBAL_HOOKS}
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
        changes = [change for part in self._parts for change in part.restore()] + self._restore_global_hooks()
        for name, part in self._module.named_modules():
            if part.training != self._modes.get(name, part.training):
                changes.append(f"mode of {name or 'the model'}")
                part.training = self._modes[name]
        for name, saved in self._saved.items():
            changes += _restore_tensor(name, saved)
        return changes

    def _restore_global_hooks(self) -> list[str]:
        changes = []
        for name, before in self._global_hooks.items():
            now = getattr(torch.nn.modules.module, name)
            if dict(now) != before:
                changes.append(f"hooks of all modules ({name.strip('_').replace('_', ' ')})")
                now.clear()
                now.update(before)
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

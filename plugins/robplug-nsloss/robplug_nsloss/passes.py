"""Passes of clean and of noisy samples that differ in the samples alone: the same modes, the same batch statistics."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robplug.errors import InputError
from robplug.step import untouched_buffers
from robplug.targets import evaluation_mode
from robplug_nsloss.activations import recording

Statistics = dict[_BatchNorm, list[tuple[Tensor, Tensor]]]


@dataclass
class Watched:
    """A forward pass of clean samples.

    Attributes:
        names: of the activations.
        activations: with their graph.
        statistics: per batch norm that used those of the batch, mean and variance of each use, detached.
        drew: whether the pass drew random numbers from PyTorch's generators, as dropout does.
    """

    names: list[str] = field(default_factory=list)
    activations: list[Tensor] = field(default_factory=list)
    statistics: Statistics = field(default_factory=lambda: defaultdict(list))
    drew: bool = False


@contextmanager
def watching(model: nn.Module, layers: Sequence[str] | None) -> Iterator[Watched]:
    """Watches the forward pass that is made inside; arguments and errors are those of `recording`."""
    watched = Watched()
    before = _global_numbers(model)
    with _noted_statistics(model, watched.statistics), recording(model, layers) as recorder:
        yield watched
    watched.drew = any(not torch.equal(a, b) for a, b in zip(before, _global_numbers(model), strict=True))
    watched.names, watched.activations = recorder.names, recorder.tensors


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Inside, no buffer changes, and all but batch norm is in eval mode: dropout is off."""
    modes = {part: part.training for part in _batch_norms(model)}
    with untouched_buffers(model), evaluation_mode(model):
        for part, mode in modes.items():
            part.training = mode
        yield


@contextmanager
def same_statistics(statistics: Statistics) -> Iterator[None]:
    """Inside, batch norm that used the statistics of a clean batch uses those again, as constants, use by use."""
    before = {part: (part.training, dict(part._buffers)) for part in statistics}
    with ExitStack() as stack:
        for part, uses in statistics.items():
            hook = part.register_forward_pre_hook(partial(_use_next, deque(uses)))
            stack.callback(hook.remove)
            part.training = False
        try:
            yield
        finally:
            for part, (mode, buffers) in before.items():
                part.training = mode
                part._buffers.update(buffers)


@contextmanager
def _noted_statistics(model: nn.Module, statistics: Statistics) -> Iterator[None]:
    def note(part: _BatchNorm, inputs: tuple[Tensor, ...]) -> None:
        if part.training or part.running_mean is None:
            x = inputs[0].detach()
            x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
            found = torch.var_mean(x, dim=[0, *range(2, x.dim())], correction=0)
            # PyTorch wants them in the dtype of the weights
            variance, mean = (each if part.weight is None else each.to(part.weight.dtype) for each in found)
            statistics[part].append((mean, variance))

    with ExitStack() as stack:
        for part in _batch_norms(model):
            stack.callback(part.register_forward_pre_hook(note).remove)
        yield


def _use_next(waiting: deque[tuple[Tensor, Tensor]], part: _BatchNorm, inputs: Any) -> None:
    if not waiting:
        remedy = "the forward depends on the values of its samples; freeze batch norm"
        raise InputError("as many uses of batch norm as in the clean pass", "more of them", remedy)
    part._buffers["running_mean"], part._buffers["running_var"] = waiting.popleft()


def _batch_norms(model: nn.Module) -> list[_BatchNorm]:
    return [part for part in model.modules() if isinstance(part, _BatchNorm)]


def _global_numbers(model: nn.Module) -> list[Tensor]:
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]

"""Batch norm with several statistics: the main ones are the layer itself, the auxiliary ones plain layers inside it.

So the main statistics have the keys of a plain network, and each of them has a mode of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robplug.errors import InputError
from robplug_advprop.kernels.ops import mixture_batch_norm

Route = int | tuple[int, ...]
"""The number of the statistics for a whole batch, 0 for the main ones, or the sizes of the parts of 0, 1, 2, ..."""

# ``by_layer`` is a mapping from id(layer) to its Route, or missing or None. No ContextVar, and always read by getattr:
# torch.compile cannot see into the one, and guards on the other.
ROUTES = threading.local()


class MixtureBatchNorm(_BatchNorm):
    """What `MixtureBatchNorm1d`, `2d` and `3d` share.

    A batch goes through the main statistics unless a `robplug_advprop.route` says otherwise.

    Args:
        num_features: channels C of the input, (N, C, ...).
        auxiliary: number K of auxiliary statistics, each with weight, bias and running statistics of its own.
        eps: added to each variance.
        momentum: of the running statistics; None keeps the cumulative average.
        affine: whether there are weight and bias.
        track_running_stats: whether there are running statistics.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Attributes:
        auxiliary: K plain layers; that of route k is ``auxiliary[k - 1]``.

    Raises:
        InputError: ``auxiliary`` is below 1; in a pass, the batch is not as large as its route says.

    Source: Xie et al. 2020, Adversarial Examples Improve Image Recognition, section 4.
    """

    auxiliary: nn.ModuleList

    def __init__(
        self,
        num_features: int,
        auxiliary: int = 1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        options: dict[str, Any] = {"eps": eps, "momentum": momentum, "device": device, "dtype": dtype}
        super().__init__(num_features, affine=affine, track_running_stats=track_running_stats, **options)
        add_auxiliary(self, auxiliary, plain_kind(self))

    def forward(self, input: Tensor) -> Tensor:
        """Returns the normalised input, (N, C, ...), with its dtype and strides."""
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        routes = getattr(ROUTES, "by_layer", None)
        route: Route = 0 if routes is None else routes.get(id(self), 0)
        if isinstance(route, int):
            return self._whole(input, route)
        if sum(route) != len(input):
            remedy = "give the sizes of this batch's parts to route"
            raise InputError(f"a batch of {sum(route)} samples on the route sizes={list(route)}", len(input), remedy)
        parts = [self if k == 0 else self.auxiliary[k - 1] for k in range(len(route))]
        if all(part.training or part.running_mean is None for part in parts):
            return self._together(input, route, parts)
        return torch.cat([self._whole(part, k) for k, part in enumerate(input.split(route))])

    def _whole(self, x: Tensor, k: int) -> Tensor:
        """Normalises a batch by the statistics k alone, as a plain layer does."""
        out: Tensor = super().forward(x) if k == 0 else self.auxiliary[k - 1](x)
        return out

    def _together(self, x: Tensor, sizes: tuple[int, ...], parts: Sequence[Any]) -> Tensor:
        """Normalises each part of a batch by its own statistics, and updates the running ones."""
        options: dict[str, Any] = {"eps": self.eps}
        if self.track_running_stats and self.running_mean is not None:
            for part in parts:
                part.num_batches_tracked.add_(1)
            options["momentum"] = [1 / p.num_batches_tracked if p.momentum is None else p.momentum for p in parts]
            options["running_mean"] = [part.running_mean for part in parts]
            options["running_var"] = [part.running_var for part in parts]
        if self.affine:
            options["weight"], options["bias"] = [part.weight for part in parts], [part.bias for part in parts]
        return mixture_batch_norm(x, sizes, **options)


class MixtureBatchNorm1d(MixtureBatchNorm, nn.BatchNorm1d):
    """Mixture batch norm over (N, C) or (N, C, L); see `MixtureBatchNorm`."""


class MixtureBatchNorm2d(MixtureBatchNorm, nn.BatchNorm2d):
    """Mixture batch norm over (N, C, H, W); see `MixtureBatchNorm`."""


class MixtureBatchNorm3d(MixtureBatchNorm, nn.BatchNorm3d):
    """Mixture batch norm over (N, C, D, H, W); see `MixtureBatchNorm`."""


class MixtureSyncBatchNorm(MixtureBatchNorm, nn.SyncBatchNorm):
    """What `convert` makes of a SyncBatchNorm; see `MixtureBatchNorm`.

    A route of one number is synchronised as ever; one of several sizes is not, and refused among several processes.
    """

    def _together(self, x: Tensor, sizes: tuple[int, ...], parts: Sequence[Any]) -> Tensor:
        group = torch.distributed
        if group.is_available() and group.is_initialized() and group.get_world_size(self.process_group) > 1:
            remedy = "make a pass for each route, or convert a network with plain batch norm"
            raise InputError("one process for a route of several sizes", "SyncBatchNorm among several", remedy)
        return super()._together(x, sizes, parts)


KINDS: dict[type[_BatchNorm], type[MixtureBatchNorm]] = {
    nn.BatchNorm1d: MixtureBatchNorm1d,
    nn.BatchNorm2d: MixtureBatchNorm2d,
    nn.BatchNorm3d: MixtureBatchNorm3d,
    nn.SyncBatchNorm: MixtureSyncBatchNorm,
}


def plain_kind(layer: MixtureBatchNorm) -> type[_BatchNorm]:
    """Returns the kind of layer that has the main statistics only."""
    return next(plain for plain, kind in KINDS.items() if isinstance(layer, kind))


def add_auxiliary(layer: _BatchNorm, count: int, kind: type[_BatchNorm]) -> None:
    """Gives a layer auxiliary statistics: plain layers with a copy of its state.

    Raises:
        InputError: ``count`` is below 1.
    """
    if count < 1:
        raise InputError("auxiliary >= 1", count)
    layer.auxiliary = nn.ModuleList(_copy(layer, kind) for _ in range(count)).train(layer.training)


def _copy(layer: _BatchNorm, kind: type[_BatchNorm]) -> _BatchNorm:
    copy = kind(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
    for name, parameter in layer._parameters.items():
        if parameter is not None:
            copy._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
    for name, buffer in layer._buffers.items():
        copy._buffers[name] = None if buffer is None else buffer.clone()
    if isinstance(layer, nn.SyncBatchNorm):
        copy.process_group = layer.process_group  # type: ignore[assignment]
    return copy

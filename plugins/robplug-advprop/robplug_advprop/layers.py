"""Batch norm with several statistics: the main ones are the layer itself, the auxiliary ones plain layers inside it.

So the main statistics have the keys of a plain network, and each of them has a mode of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robplug.errors import InputError
from robplug_advprop.kernels.ops import mixture_batch_norm
from robplug_advprop.kernels.reference import accumulator
from robplug_advprop.synchronised import moments

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
        parts = self._parts()[: len(route)]
        if all(part.training or part.running_mean is None for part in parts):
            return self._together(input, route, parts)
        return torch.cat([self._whole(part, k) for k, part in enumerate(input.split(route))])

    def processes(self) -> int:
        """Returns the number of processes that share statistics."""
        return 1

    def _parts(self) -> list[Any]:
        """Returns the layers that have the statistics 0, 1, 2, ..."""
        return [self, *self.auxiliary]

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
            options["momentum"] = [
                1 / p.num_batches_tracked.double() if p.momentum is None else p.momentum for p in parts
            ]
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


class MixtureSyncBatchNorm(MixtureBatchNorm):
    """What `convert` makes of a SyncBatchNorm: in training, statistics are those of all processes together.

    Samples belong to the statistics that the route of their own process gives them, wherever they stand: processes may
    have different numbers for one of them, and none at all. Running statistics move alike in all processes. It is no
    SyncBatchNorm, since torch's DistributedDataParallel refuses one on the CPU. See `MixtureBatchNorm`.

    Attributes:
        process_group: the processes; None means all.

    Raises:
        InputError: in training on the CPU, statistics get fewer than two values a channel from all processes together.
            Elsewhere, and compiled, nobody looks, since to read a number is to wait for the device, or to break the
            graph: one value gives a running variance of NaN.
    """

    _check_input_dim = nn.SyncBatchNorm._check_input_dim

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.process_group: Any = None

    def processes(self) -> int:
        """Returns the number of processes that share statistics, 1 where nothing is distributed."""
        group = torch.distributed
        return group.get_world_size(self.process_group) if group.is_available() and group.is_initialized() else 1

    def _whole(self, x: Tensor, k: int) -> Tensor:
        if self._parts()[k].training and self.processes() > 1:
            return self._shared(x, {k: len(x)})
        return super()._whole(x, k)

    def _together(self, x: Tensor, sizes: tuple[int, ...], parts: Sequence[Any]) -> Tensor:
        if all(part.training for part in parts) and self.processes() > 1:
            return self._shared(x, dict(enumerate(sizes)))
        return super()._together(x, sizes, parts)

    def _shared(self, x: Tensor, sizes: dict[int, int]) -> Tensor:
        """Normalises a batch whose parts, in order, belong to the statistics of these numbers."""
        parts, exact = self._parts(), x.to(accumulator(x))
        # statistics that nobody here uses, others may
        batches = exact.split([sizes.get(k, 0) for k in range(len(parts))])
        counts, means, variances = moments(batches, self.process_group)
        if x.is_cpu and not torch.compiler.is_compiling():
            _enough(counts.tolist(), sizes)
        if self.track_running_stats and self.running_mean is not None:
            self._follow(parts, counts, means.detach(), variances.detach())
        outs = []
        for k in sizes:
            shape = (-1, *[1] * (x.dim() - 2))
            inverse = (variances[k] + self.eps).rsqrt()
            scale = inverse if parts[k].weight is None else inverse * parts[k].weight
            out = (batches[k] - means[k].view(shape)) * scale.view(shape)
            outs.append(out if parts[k].bias is None else out + parts[k].bias.view(shape))
        return torch.cat(outs).to(x.dtype)

    @torch.no_grad()
    def _follow(self, parts: Sequence[Any], counts: Tensor, means: Tensor, variances: Tensor) -> None:
        """Updates the running statistics of which some process has samples."""
        unbiased = variances * (counts / (counts - 1))[:, None]
        for part, count, mean, var in zip(parts, counts, means, unbiased, strict=True):
            part.num_batches_tracked.add_(count > 0)
            share = 1 / part.num_batches_tracked.clamp_min(1).double() if part.momentum is None else part.momentum
            for running, batch in ((part.running_mean, mean), (part.running_var, var)):
                running.lerp_(batch.to(running.dtype), ((count > 0).to(count) * share).to(running.dtype))


def _enough(counts: Sequence[float], named: Iterable[int]) -> None:
    few = {k: int(count) for k, count in enumerate(counts) if count == 1 or (count == 0 and k in named)}
    if few:
        got = ", ".join(f"{count} for statistics {k}" for k, count in few.items())
        remedy = "make the batch larger (drop_last=True), or use the eval mode"
        raise InputError("at least 2 values a channel from all processes together in training", got, remedy)


class SharedStatistics(_BatchNorm):
    """Auxiliary statistics of a `MixtureSyncBatchNorm`."""

    _check_input_dim = nn.SyncBatchNorm._check_input_dim


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
    plain = SharedStatistics if kind is nn.SyncBatchNorm else kind
    copy = plain(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
    for name, parameter in layer._parameters.items():
        if parameter is not None:
            copy._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
    for name, buffer in layer._buffers.items():
        copy._buffers[name] = None if buffer is None else buffer.clone()
    return copy

"""Choosing the statistics that a pass goes through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from torch import nn

from robplug.errors import InputError
from robplug_advprop.layers import ROUTES, MixtureBatchNorm, Route


@contextmanager
def route(
    model: nn.Module, which: Literal["main"] | int | None = None, *, sizes: Sequence[int] | None = None
) -> Iterator[None]:
    """Inside, the model's batches are normalised by other statistics than the main ones.

    Routes nest, the innermost counts; one of a part of a model changes nothing else. They belong to the thread that
    enters them, and end with the block, whatever happens in it. What runs a layer again later, such as gradient
    checkpointing in a backward pass, has to be inside too, and in the same thread.

    Args:
        model: a converted model, or a part of one.
        which: ``"main"`` or 0 for the main statistics, k from 1 to K for the k-th auxiliary ones.
        sizes: instead, for a batch of several parts: sizes[0] samples for the main statistics, then sizes[1] for the
            first auxiliary ones, and so on. Where all statistics are shared by several processes (SyncBatchNorm), a
            process without samples for some of them says 0.

    Raises:
        InputError: the model has no mixture batch norm or not as many statistics, a part is empty, or both or none of
            ``which`` and ``sizes`` are given. In a pass: the batch is not as large as ``sizes`` say. At the end: routes
            overlap without one inside the other, which ends them all.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from robplug_advprop import convert, route
        >>> net = convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
        >>> x = torch.rand(6, 3, 5, 5)
        >>> with route(net, sizes=[4, 2]):
        ...     out = net(x)
    """
    layers = [part for part in model.modules() if isinstance(part, MixtureBatchNorm)]
    if not layers:
        remedy = "convert(model, auxiliary=K) gives it some"
        raise InputError("a model with mixture batch norm", type(model).__name__, remedy)
    least = 0 if all(layer.processes() > 1 for layer in layers) else 1
    chosen = _read(which, sizes, min(len(layer.auxiliary) for layer in layers), least)
    before = getattr(ROUTES, "by_layer", None)
    ROUTES.by_layer = own = {**(before or {}), **{id(layer): chosen for layer in layers}}
    try:
        yield
    finally:
        crossed = ROUTES.by_layer is not own
        ROUTES.by_layer = None if crossed else before
    if crossed:
        remedy = "use with, and leave it in the thread that entered it"
        raise InputError("the innermost route to end first", "routes that overlap", remedy)


def _read(which: str | int | None, sizes: Sequence[int] | None, auxiliary: int, least: int) -> Route:
    if (which is None) == (sizes is None):
        raise InputError("a route by number or by sizes", f"which={which!r} and sizes={sizes!r}", "give one of the two")
    if sizes is not None:
        if not 1 <= len(sizes) <= auxiliary + 1:
            raise InputError(f"1 to {auxiliary + 1} sizes, main and {auxiliary} auxiliary", list(sizes))
        if min(sizes) < least:
            expected = "parts of at least one sample" if least else "sizes >= 0"
            remedy = "for a batch of one part, give its number: route(model, 1)"
            raise InputError(expected, f"sizes={list(sizes)}", remedy)
        return tuple(int(size) for size in sizes)
    number = 0 if which == "main" else which
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= auxiliary:
        raise InputError(
            f'"main" or a number from 0 to {auxiliary}', repr(which), "convert gives as many as it is told"
        )
    return number

"""Which statistics a converted network has during training, and which remain afterwards."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from robplug.defenses import Prepared
from robplug.errors import InputError
from robplug_advprop.layers import MixtureBatchNorm
from robplug_advprop.surgery import convert, drop_auxiliary

Kept = Literal["main", "all"] | int


def keep_only(model: nn.Module, which: Literal["main"] | int) -> nn.Module:
    """Takes all but one of the statistics of a converted network away, in place: an ordinary network remains.

    To see a network through each of its statistics, take copies: ``keep_only(copy.deepcopy(model), 1)``.

    Args:
        model: a converted network.
        which: ``"main"`` or 0 for the main statistics, k from 1 to K for the k-th auxiliary ones, with their weights.

    Returns:
        The model, which computes what it did on the route ``which``.

    Raises:
        InputError: the network is not converted, or has fewer statistics. It is unchanged then.

    Source: Xie and Yuille 2020, Intriguing Properties of Adversarial Training at Scale, section 4.2 (chapter 6 of the
        dissertation, section 6.4.2): MBN_clean is ``"main"``, MBN_adv is 1.
    """
    layers = mixtures(model)
    fewest = min((len(layer.auxiliary) for layer in layers), default=0)
    number = 0 if which == "main" else which
    if layers and number not in range(fewest + 1):
        raise InputError(f'"main" or a number from 0 to {fewest}', repr(which))
    for layer in layers if number else ():
        _copy_state(layer.auxiliary[number - 1], layer)
    return drop_auxiliary(model)


def prepare(model: nn.Module, auxiliary: int) -> Prepared:
    """Converts a network; one that has as many auxiliary statistics already goes on as it is.

    Raises:
        InputError: there is no batch norm, or it is converted with another number of statistics.
    """
    if not mixtures(model):
        convert(model, auxiliary)
    layers = mixtures(model)
    for layer in layers:
        if len(layer.auxiliary) != auxiliary:
            remedy = "drop_auxiliary(model) first"
            raise InputError(f"batch norm with {auxiliary} auxiliary statistics", len(layer.auxiliary), remedy)
    return Prepared(parameters=[p for layer in layers for p in layer.auxiliary.parameters()])


def finish(model: nn.Module, keep: Kept) -> nn.Module:
    """Returns the network with the statistics that are to stay."""
    return model if keep == "all" else keep_only(model, keep)


def check_kept(keep: Kept, auxiliary: int) -> None:
    """Refuses what `finish` could not keep after training."""
    number = isinstance(keep, int) and not isinstance(keep, bool) and 0 <= keep <= auxiliary
    if not number and keep not in ("main", "all"):
        raise InputError(f'keep to be "main", "all" or a number from 0 to {auxiliary}', repr(keep))


def mixtures(model: nn.Module) -> list[Any]:
    """Returns the layers with auxiliary statistics."""
    return [part for part in model.modules() if isinstance(part, MixtureBatchNorm)]


@torch.no_grad()
def _copy_state(source: nn.Module, destination: nn.Module) -> None:
    own = (*destination.named_parameters(recurse=False), *destination.named_buffers(recurse=False))
    other = dict((*source.named_parameters(recurse=False), *source.named_buffers(recurse=False)))
    for name, tensor in own:
        tensor.copy_(other[name])

"""Changing the batch norm of a network, and changing it back."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from robplug.errors import InputError
from robplug_advprop.layers import KINDS, MixtureBatchNorm, add_auxiliary, plain_kind


def convert(model: nn.Module, auxiliary: int = 1) -> nn.Module:
    """Gives every batch norm of a network auxiliary statistics, in place.

    The layers stay the same objects, with their parameters, hooks and modes; they only become a `MixtureBatchNorm1d`,
    `2d` or `3d`. Each of the new statistics begins as a copy of the main ones. Until a `route` says otherwise, the
    network computes what it did. The keys of its state_dict stay, and ``*.auxiliary.*`` are new:
    without those it loads into a network that was never converted.

    Args:
        model: any network with batch norm, nested and shared at will; SyncBatchNorm, too.
        auxiliary: number K of auxiliary statistics.

    Returns:
        The model.

    Raises:
        InputError: there is no batch norm, it is of an unknown kind, or some of it is converted already (convert once,
            or drop_auxiliary first). The model is unchanged then.
    """
    layers = _batch_norms(model)
    for name, layer in layers.items():
        if isinstance(layer, MixtureBatchNorm):
            remedy = "it is converted already; drop_auxiliary(model) first, to convert anew"
            raise InputError("plain batch norm", f"{type(layer).__name__} at {name!r}", remedy)
        if type(layer) not in KINDS:
            remedy = "a lazy one wants a first pass; another one a plain layer in its place"
            known = ", ".join(kind.__name__ for kind in KINDS)
            raise InputError(f"batch norm of the kinds {known}", f"{type(layer).__name__} at {name!r}", remedy)
    for layer in layers.values():
        kind = type(layer)
        add_auxiliary(layer, auxiliary, kind)
        layer.__class__ = KINDS[kind]
    return model


def drop_auxiliary(model: nn.Module) -> nn.Module:
    """Takes the auxiliary statistics of a converted network away, in place: what remains is an ordinary network.

    Returns:
        The model, which computes what it did on the route ``"main"``.

    Raises:
        InputError: there is nothing to drop.
    """
    layers = [part for part in model.modules() if isinstance(part, MixtureBatchNorm)]
    if not layers:
        raise InputError("a model with mixture batch norm", type(model).__name__, "there is nothing to drop")
    for layer in layers:
        plain = plain_kind(layer)
        del layer.auxiliary
        layer.__class__ = plain  # type: ignore[assignment]
    return model


def convert_group_norm(model: nn.Module, groups: int = 32) -> nn.Module:
    """Replaces every batch norm of a network by group norm, in place: the control that knows no batch.

    Weight and bias stay the same parameters; running statistics and the replaced layers' hooks are gone.

    Args:
        model: any network with plain batch norm, nested and shared at will.
        groups: of channels; each layer's number of channels is a multiple.

    Returns:
        The model, or the new layer if the model is one batch norm.

    Raises:
        InputError: there is no batch norm, it is a mixture, or its channels do not fit. The model is unchanged then.

    Source: Xie and Yuille 2020, Intriguing Properties of Adversarial Training at Scale (batch-unrelated
        normalization layers); Wu and He 2018.
    """
    if groups < 1:
        raise InputError("groups >= 1", groups)
    layers = _batch_norms(model)
    for name, layer in layers.items():
        if isinstance(layer, MixtureBatchNorm):
            raise InputError("plain batch norm", f"{type(layer).__name__} at {name!r}", "drop_auxiliary(model) first")
        if layer.num_features % groups:
            got = f"{layer.num_features} channels at {name!r}"
            raise InputError(f"channels in {groups} equal groups", got, "choose groups that divide them")
    new: dict[nn.Module, nn.Module] = {layer: _group_norm(layer, groups) for layer in layers.values()}
    for parent in list(model.modules()):
        # not named_children(), which names a shared layer once
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]
    return new.get(model, model)


def _group_norm(layer: Any, groups: int) -> nn.Module:
    norm = nn.GroupNorm(groups, layer.num_features, layer.eps, layer.affine)
    norm.weight, norm.bias = layer.weight, layer.bias
    return norm.train(layer.training)


def _batch_norms(model: nn.Module) -> dict[str, Any]:
    """Returns every batch norm, once, by its first name; the statistics inside of a mixture are no layers."""
    inside = {id(part) for layer in model.modules() if isinstance(layer, MixtureBatchNorm) for part in layer.auxiliary}
    layers = {
        name: part for name, part in model.named_modules() if isinstance(part, _BatchNorm) and id(part) not in inside
    }
    if not layers:
        remedy = "with group or layer norm, whose statistics are each sample's own, there is nothing to do"
        raise InputError("a model with batch norm", f"{type(model).__name__} without", remedy)
    return layers

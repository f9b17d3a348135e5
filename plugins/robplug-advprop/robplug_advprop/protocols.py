"""What chapter 6 of the dissertation does to batch norm besides mixing it, each a defence that stacks with others."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from robplug.defenses import Defense, Prepared
from robplug.errors import InputError
from robplug_advprop.surgery import convert_group_norm


@dataclass(frozen=True)
class RunningStatistics(Defense):
    """Trains with batch norm in eval mode: by its running statistics, as at test time.

    For the last epochs: train with batch statistics first, then train that network on with this in the stack.

    Source: Xie and Yuille 2020, Intriguing Properties of Adversarial Training at Scale, section 4.3, the last 10 of 110
        epochs.
    """

    def prepare(self, model: nn.Module) -> Prepared:
        """Refuses a model without batch norm."""
        _batch_norms(model)
        return Prepared()

    def mode(self, model: nn.Module) -> None:
        """Puts batch norm into eval mode."""
        for layer in _batch_norms(model):
            layer.eval()


@dataclass(frozen=True)
class BatchNormOnly(Defense):
    """Trains the weights and statistics of batch norm and nothing else.

    For fine-tuning on clean samples a network that was trained on adversarial ones, or the other way round. The other
    parameters do not require a gradient meanwhile; afterwards all of them do.

    Source: Xie and Yuille 2020, Intriguing Properties of Adversarial Training at Scale, section 4.4.
    """

    def prepare(self, model: nn.Module) -> Prepared:
        """Freezes all other parameters."""
        layers = _batch_norms(model)
        model.requires_grad_(False)
        for layer in layers:
            layer.requires_grad_(True)
        return Prepared()

    def finish(self, model: nn.Module) -> nn.Module:
        """Returns the model with all parameters trainable."""
        return model.requires_grad_(True)


@dataclass(frozen=True)
class GroupNormControl(Defense):
    """Trains with group norm in the place of batch norm, and leaves it there: the control that knows no batch.

    The weights load into ``convert_group_norm(network, groups)``.

    Source: Xie and Yuille 2020, Intriguing Properties of Adversarial Training at Scale, section 4.2; Wu and He 2018.

    Attributes:
        groups: of channels; each layer's number of channels is a multiple.
    """

    groups: int = 32

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise InputError("groups >= 1", self.groups)

    def prepare(self, model: nn.Module) -> Prepared:
        """Replaces batch norm."""
        convert_group_norm(model, self.groups)
        return Prepared()


def _batch_norms(model: nn.Module) -> list[_BatchNorm]:
    layers = [part for part in model.modules() if isinstance(part, _BatchNorm)]
    if not layers:
        raise InputError("a model with batch norm", f"{type(model).__name__} without")
    return layers

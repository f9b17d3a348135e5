"""How much activations change when noise is added to the samples: NsLoss, and the same per layer free of scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robplug_nsloss.comparison import compare, loss_against
from robplug_nsloss.noise import Noise, check_samples
from robplug_nsloss.passes import quiet, watching


class LayerSensitivity(NamedTuple):
    """How a layer answers to noise.

    Attributes:
        name: of the layer.
        change: mean |a(x + delta) - a(x)| over samples, draws and neurons.
        relative: the same divided by mean |a(x)|, which no rescaling of layers changes; 0 where nothing changes.
    """

    name: str
    change: float
    relative: float


def ns_loss(
    model: nn.Module,
    x: Tensor,
    *,
    radius: float = 1.0,
    draws: int = 5,
    layers: Sequence[str] | None = None,
    clip: tuple[float, float] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Returns the sum over layers of mean |a(x + delta) - a(x)| / radius, delta on the sphere, to be added to any loss.

    All passes are its own, in which dropout is off (everything but batch norm is in eval mode), and no running
    statistic moves. Batch norm in train mode normalises the noisy copies by the statistics of the clean batch, as
    constants. Layers that draw numbers in eval mode, too, are compared with their noise.

    One noisy copy is held at a time: its gradient is taken at once, and for the clean side's, sums of signs are kept.

    Args:
        model: maps samples to logits.
        x: (B, ...) samples.
        radius: length of the noise, in units of the data (the paper's NsEps).
        draws: noisy copies, 1 to 127 (the paper's N).
        layers: names of modules whose outputs are compared, ``"logits"`` for the model's; None means the logits and all
            ReLU-like outputs, of modules and of functions, those in place too.
        clip: smallest and largest value of a noisy copy; None, the paper being silent about it, clips nothing.
        generator: of the noise, on the device of x; None means PyTorch's global one.

    Returns:
        A scalar.

    Differentiable: once, in the parameters of the model; not in x.

    Raises:
        InputError: radius, draws, samples or layers do not fit, or an activation is not finite.

    Source: Fidel et al. 2020, Adversarial Robustness via Stochastic Regularization of Neural Activation Sensitivity,
        section III-B, algorithm 1.
    Differs: the algorithm divides by a neuron's mean activation and the loss multiplies by it; here both are left out,
        so that neurons that are always 0 give no 0 / 0.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> loss = ns_loss(model, torch.rand(2, 4))
        >>> loss.backward()
    """
    noise = Noise(radius, draws, clip, generator)
    check_samples(x)
    with quiet(model):
        with watching(model, layers) as clean:
            model(x.detach())
        return loss_against(clean, model, x, noise, layers)


@torch.no_grad()
def layer_sensitivity(
    model: nn.Module,
    x: Tensor,
    *,
    radius: float = 1.0,
    draws: int = 5,
    layers: Sequence[str] | None = None,
    clip: tuple[float, float] | None = None,
    generator: torch.Generator | None = None,
) -> list[LayerSensitivity]:
    """Returns what `ns_loss` sums up, layer by layer, and relative to the size of the activations.

    A ReLU network's NsLoss falls when layers are rescaled against each other, which leaves the function as it is; the
    relative change does not. Arguments and errors are those of `ns_loss`.
    """
    noise = Noise(radius, draws, clip, generator)
    check_samples(x)
    with quiet(model):
        with watching(model, layers) as clean:
            model(x)
        means = compare(clean, model, x, noise, layers, []).means
    sizes = [float(activation.abs().mean()) for activation in clean.activations]
    changes = (means / draws).tolist()
    return [
        LayerSensitivity(name, change, _ratio(change, size))
        for name, change, size in zip(clean.names, changes, sizes, strict=True)
    ]


def _ratio(change: float, size: float) -> float:
    """Returns change / size; a layer that is 0 on the clean samples has a change of 0 or an infinite one."""
    if size == 0:
        return 0.0 if change == 0 else math.inf
    return change / size

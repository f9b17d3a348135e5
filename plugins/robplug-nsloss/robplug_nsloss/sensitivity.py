"""How much activations change when noise is added to the samples: NsLoss, and the same per layer free of scale."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from robplug.errors import InputError
from robplug.step import untouched_buffers
from robplug_nsloss.activations import recording
from robplug_nsloss.kernels.ops import accumulate_signs, sphere_noise
from robplug_nsloss.passes import Watched, quiet, same_statistics, watching

MOST_DRAWS = 127  # sums of signs are int8


@dataclass(frozen=True)
class Noise:
    """Copies of samples with noise on the sphere ||delta||_2 = radius, uniform on it.

    Attributes:
        radius: in units of the data.
        draws: number of copies, 1 to 127.
        clip: smallest and largest value of a copy, or None to let it leave the box.
        generator: of PyTorch, on the device of the samples; None means the global one.

    Raises:
        InputError: radius or draws do not fit.
    """

    radius: float = 1.0
    draws: int = 5
    clip: tuple[float, float] | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.radius) and self.radius > 0):
            raise InputError("a finite radius > 0", self.radius, "the paper has 1.0 for MNIST and 3.0 for CIFAR-10")
        if not 1 <= self.draws <= MOST_DRAWS:
            raise InputError(f"draws from 1 to {MOST_DRAWS}", self.draws, "the paper has 5 and 10")

    def copies(self, x: Tensor) -> Iterator[Tensor]:
        """Yields the noisy copies of x, (B, ...), one at a time."""
        x = x.detach()
        for _ in range(self.draws):
            normal = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=self.generator)
            noisy = sphere_noise(x, normal, self.radius)
            yield noisy if self.clip is None else noisy.clamp(*self.clip)


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


def loss_against(clean: Watched, model: nn.Module, x: Tensor, noise: Noise, layers: Sequence[str] | None) -> Tensor:
    """Returns `ns_loss` beside a clean pass that has been made; the model must be in the modes of that pass."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = _compare(clean, model, x, noise, layers, parameters)
    factor = 1 / (noise.draws * noise.radius)
    value = found.means.sum() * factor
    return _Known.apply(value, factor, found, *parameters, *clean.activations)  # type: ignore[no-untyped-call, no-any-return]


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
        means = _compare(clean, model, x, noise, layers, []).means
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


def check_samples(x: Tensor) -> None:
    """Refuses a batch without samples or of whole numbers."""
    if not len(x) or not x.is_floating_point():
        raise InputError("a batch of at least one sample of a floating dtype", f"{tuple(x.shape)} {x.dtype}")


@dataclass
class _Compared:
    """The comparison of all draws with the clean pass.

    Attributes:
        means: (L,) per layer mean |difference|, summed over the draws.
        signs: per layer the sum over the draws of the differences' signs, int8.
        gradients: of the sum of ``means`` by the parameters, the clean side held fixed.
    """

    means: Tensor
    signs: list[Tensor]
    gradients: list[Tensor | None]


def _compare(
    clean: Watched,
    model: nn.Module,
    x: Tensor,
    noise: Noise,
    layers: Sequence[str] | None,
    parameters: list[nn.Parameter],
) -> _Compared:
    fixed = [activation.detach() for activation in clean.activations]
    signs = [torch.empty_like(activation, dtype=torch.int8) for activation in fixed]
    gradients: list[Tensor | None] = [None] * len(parameters)
    total: Tensor | float = 0.0
    with untouched_buffers(model):
        for draw, copy in enumerate(noise.copies(x)):
            with same_statistics(model, clean.statistics), recording(model, layers) as noisy:
                model(copy)
            _check_same(clean, noisy.names)
            means = accumulate_signs(fixed, noisy.tensors, signs, draw)
            del noisy  # its graph is gone before the next copy's begins
            if means.requires_grad:
                gradients = _added(gradients, _gradients(means.sum(), parameters, fixed))
            total = total + means.detach()
    assert isinstance(total, Tensor)  # there is a draw
    _check_finite(clean.names, total)
    return _Compared(total, signs, gradients)


def _gradients(loss: Tensor, parameters: list[nn.Parameter], activations: list[Tensor]) -> Sequence[Tensor | None]:
    """Differentiates; in half precision 1 / numel would underflow, so that the loss is scaled there."""
    scale = 1.0
    if any(activation.dtype == torch.float16 for activation in activations):
        counts = [activation.numel() for activation in activations]
        scale = 2.0 ** round(math.log2(min(counts) * max(counts)) / 2)
    found = torch.autograd.grad(loss * scale, parameters, allow_unused=True)
    return found if scale == 1 else [None if gradient is None else gradient / scale for gradient in found]


def _added(sums: Sequence[Tensor | None], more: Sequence[Tensor | None]) -> list[Tensor | None]:
    pairs = zip(sums, more, strict=True)
    return [new if old is None else old if new is None else old.add_(new) for old, new in pairs]


def _check_same(clean: Watched, names: list[str]) -> None:
    if clean.names != names:
        expected = f"the layers of the clean pass ({', '.join(clean.names)}) in that of noisy samples"
        remedy = "the forward depends on the values of its samples: name layers that are always used"
        raise InputError(expected, ", ".join(names), remedy)


def _check_finite(names: list[str], means: Tensor) -> None:
    finite = means.isfinite()
    if not bool(finite.all()):
        first = names[int(finite.logical_not().nonzero()[0])]
        remedy = "it comes first; look at the weights before it, or lower the learning rate"
        raise InputError("finite activations", f"NaN or infinity in {first}", remedy)


class _Known(torch.autograd.Function):
    """A value whose gradients by parameters, of the noisy side, and by activations, of the clean side, are known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float, found: _Compared, *tensors: Tensor) -> Tensor:
        ctx.factor, ctx.found = factor, found
        ctx.dtypes = [tensor.dtype for tensor in tensors[len(found.gradients) :]]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        g = upstream[0] * ctx.factor
        noisy = (None if gradient is None else gradient * g.to(gradient.dtype) for gradient in ctx.found.gradients)
        signs = zip(ctx.found.signs, ctx.dtypes, strict=True)
        clean = ((total * (-g / total.numel())).to(dtype) for total, dtype in signs)
        return None, None, None, *noisy, *clean

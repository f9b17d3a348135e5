"""The model under attack."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from robplug.errors import InputError
from robplug.types import Task

OFFERS = ("labels", "scores", "gradients")
"""What a model can be asked for; each includes those before it."""

DETECTOR_METHODS = ("proposals", "rescore", "detections", "losses")
"""What a detector can do; see `robplug.vision.protocol.Detector`."""


@dataclass(frozen=True)
class Target:
    """A model under attack: what attacks and referee need to know of it.

    Attributes:
        module: maps samples inside ``bounds`` to logits, (N, ...) to (N, C), or of a segmentation network to
            (N, C, H, W); a detector has the methods of `robplug.vision.protocol.Detector`. Attack libraries get it.
        bounds: smallest and largest value of a sample.
        classes: number of classes, or None if it is only known after a forward pass.
        offers: ``"gradients"``, ``"scores"`` (no gradient exists) or ``"labels"`` (logits are one-hot).
        task: what the model does.
        stochastic: whether two calls may differ.
        eot: number of draws whose logits an attack sees averaged (expectation over transformation).
        draws: number of draws whose mean probabilities give the verdict.
    """

    module: nn.Module
    bounds: tuple[float, float] = (0.0, 1.0)
    classes: int | None = None
    offers: str = "gradients"
    task: Task = "classification"
    stochastic: bool = False
    eot: int = 1
    draws: int = 1

    def __post_init__(self) -> None:
        low, high = (float(value) for value in self.bounds)
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise InputError("bounds (low, high) with low < high", self.bounds)
        object.__setattr__(self, "bounds", (low, high))
        if self.offers not in OFFERS:
            raise InputError(f"offers to be one of {', '.join(OFFERS)}", repr(self.offers))
        for name in ("eot", "draws"):
            count = getattr(self, name)
            if count < 1:
                raise InputError(f"{name} >= 1", count)
            if count > 1 and not self.stochastic:
                raise InputError(f"{name} = 1 for a deterministic target", count, "pass stochastic=True")
            if count > 1 and self.task == "detection":
                raise InputError(f"{name} = 1 for a detector", count, "boxes of several draws have no mean")

    def logits(self, x: Tensor) -> Tensor:
        """Returns the logits, differentiable if the target offers gradients; x is cast to the model's dtype.

        (N, C), or (N, C, H, W) of a segmentation network; a detector has none.
        """
        return self.module(x.to(self.dtype))  # type: ignore[no-any-return]

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Returns the predicted classes, int64: the largest mean probability over ``draws`` draws.

        (N,), or (N, H, W) of a segmentation network. Where the model gives no number the class is -1.
        """
        with settled(self.module):
            if self.draws == 1:
                scores = self.logits(x)
            else:
                scores = torch.stack([self.logits(x).softmax(1) for _ in range(self.draws)]).mean(0)
        return scores.argmax(1).masked_fill_(scores.isnan().any(1), -1)

    def proposals(self, x: Tensor) -> Any:
        """Returns a detector's `robplug.vision.protocol.Proposals`, differentiable in x through their logits."""
        return self.module.proposals(x.to(self.dtype))  # type: ignore[operator]

    def rescore(self, x: Tensor, proposals: Any) -> Tensor:
        """Returns the logits, (N, R, C), that the same proposals have in other images; differentiable in these."""
        return self.module.rescore(x.to(self.dtype), proposals)  # type: ignore[no-any-return, operator]

    @torch.no_grad()
    def detections(self, x: Tensor) -> Tensor:
        """Returns a detector's answers, (N, D, 6); see `robplug.tasks`."""
        with settled(self.module):
            return self.module.detections(x.to(self.dtype))  # type: ignore[no-any-return, operator]

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns a detector's training losses, (N,), differentiable in x."""
        return self.module.losses(x.to(self.dtype), y)  # type: ignore[no-any-return, operator]

    def reset(self, seed: int) -> None:
        """Calls ``reset(seed)`` of every submodule of a stochastic model that has it, so that it starts over."""
        for module in self.module.modules() if self.stochastic else ():
            reset = getattr(module, "reset", None)
            if callable(reset):
                reset(seed)

    def for_attack(self) -> Target:
        """Returns the target as an attack sees it: logits averaged over ``eot`` draws."""
        return self if self.eot == 1 else dataclasses.replace(self, module=_Averaged(self.module, self.eot), eot=1)

    def count_classes(self, x: Tensor) -> int:
        """Returns the number of classes, by a forward pass of one sample if it is not known."""
        if self.classes is not None:
            return self.classes
        if len(x) == 0:
            raise InputError("a sample to count the classes with", "an empty batch", "pass classes= to robplug.target")
        with torch.no_grad(), evaluation_mode(self.module):
            if self.task == "detection":
                return int(self.proposals(x[:1]).logits.shape[-1])
            return self.logits(x[:1]).shape[1]

    @property
    def device(self) -> torch.device:
        """The device of the parameters (the CPU if there are none)."""
        tensor = self._first_tensor
        return torch.device("cpu") if tensor is None else tensor.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point dtype of the parameters (float32 if there are none)."""
        tensor = self._first_tensor
        return torch.float32 if tensor is None else tensor.dtype

    @property
    def sample_dtype(self) -> torch.dtype:
        """The dtype in which samples are attacked and measured: the model's, and float32 for a half-precision model.

        A ball of 8/255 has a few dozen points a side in half precision, and most correct projections leave it.
        """
        return torch.float32 if self.dtype in (torch.float16, torch.bfloat16) else self.dtype

    @property
    def _first_tensor(self) -> Tensor | None:
        if self._first_parameter is not None:
            part, name = self._first_parameter
            return part._parameters[name]
        return next((buffer for buffer in self.module.buffers() if buffer.is_floating_point()), None)

    @functools.cached_property
    def _first_parameter(self) -> tuple[nn.Module, str] | None:
        # where it is, and not itself, is kept: a walk through the modules costs as much as a step of a small network
        places = ((part, name, own) for part in self.module.modules() for name, own in part._parameters.items())
        return next(((part, name) for part, name, own in places if own is not None and own.is_floating_point()), None)


class _Averaged(nn.Module):
    """The mean of the logits over several draws."""

    def __init__(self, module: nn.Module, draws: int) -> None:
        super().__init__()
        self.module = module
        self.draws = draws

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.module(x) for _ in range(self.draws)]).mean(0)


class Substitute(torch.autograd.Function):
    """The value of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, differentiable: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]


class _Defended(nn.Module):
    """A model behind a transformation of its input whose gradient is that of a substitute (BPDA)."""

    def __init__(self, model: nn.Module, transform: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor]):
        super().__init__()
        self.model = model
        self.transform = transform
        self.backward_approximation = backward

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            value = self.transform(x)
        value = Substitute.apply(value, self.backward_approximation(x))  # type: ignore[no-untyped-call]
        return self.model(value)  # type: ignore[no-any-return]


class _Chain(nn.Module):
    """A model behind a transformation of its input."""

    def __init__(self, model: nn.Module, transform: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.transform = transform

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.transform(x))  # type: ignore[no-any-return]


def from_module(
    model: nn.Module,
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    classes: int | None = None,
    offers: str = "gradients",
    transform: Callable[[Tensor], Tensor] | None = None,
    backward: Callable[[Tensor], Tensor] | str | None = None,
    stochastic: bool = False,
    eot: int = 1,
    draws: int = 1,
    task: Task = "classification",
) -> Target:
    """Makes a Target of an nn.Module that maps samples inside ``bounds`` to logits.

    Args:
        model: the network; neither its mode nor anything else of it is changed.
        bounds: smallest and largest value of a sample.
        classes: number of classes, if known.
        offers: ``"gradients"``, ``"scores"`` or ``"labels"``.
        transform: a test-time defence in front of the network, samples to samples.
        backward: what the gradient of ``transform`` is taken from (BPDA; Athalye et al. 2018, section 4.1):
            ``"identity"``, or a differentiable function samples to samples. Values are always the transform's own.
        stochastic: whether two calls may differ; global random numbers are seeded around each use by the referee, a
            module with its own generator has ``reset(seed)``.
        eot: draws averaged for an attack.
        draws: draws averaged for a verdict.
        task: ``"segmentation"`` for logits (N, C, H, W) of the images' size, ``"detection"`` for a module with the
            methods of `robplug.vision.protocol.Detector`.

    Raises:
        InputError: options that contradict each other, or a task that the module has no methods for.
    """
    if task not in get_args(Task):
        raise InputError(f"task to be one of {', '.join(get_args(Task))}", repr(task))
    missing = [name for name in DETECTOR_METHODS if not callable(getattr(model, name, None))]
    missing += [] if hasattr(model, "nms_threshold") else ["nms_threshold"]
    if task == "detection" and (missing or transform is not None):
        problem = "a transform" if transform is not None else f"a {type(model).__name__} without {', '.join(missing)}"
        raise InputError(
            "a module with the methods of robplug.vision.protocol.Detector", problem, "wrap the network in one"
        )
    if backward is not None and transform is None:
        raise InputError("a transform whose gradient is to be replaced", "backward without transform")
    module = model
    if transform is not None and backward is None:
        module = _Chain(model, transform)
    elif transform is not None:
        if isinstance(backward, str) and backward != "identity":
            raise InputError('backward to be "identity" or a function', repr(backward))
        substitute = backward if callable(backward) else (lambda x: x)
        module = _Defended(model, transform, substitute)
    return Target(module, bounds, classes, offers, task, stochastic, eot, draws)


@contextmanager
def settled(module: nn.Module) -> Iterator[None]:
    """Puts a module that is in train mode into eval mode for a while; leaves any other as its parts are.

    So an attack on a model in training moves no statistics, and a caller that has set modes on purpose keeps them.
    """
    with evaluation_mode(module) if module.training else nullcontext():
        yield


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Puts a module into eval mode and gives every submodule its own mode back afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode

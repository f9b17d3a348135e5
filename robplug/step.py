"""One training step as a defence sees it: the batch, and forward passes that whoever asks shares."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robplug.data import IGNORE
from robplug.errors import InputError
from robplug.rng import Rng
from robplug.targets import evaluation_mode
from robplug.types import Task

PassKind = Literal["attacker", "update", "evaluation"]
Loss = Callable[[Tensor, Tensor], Tensor]
Observer = Callable[[], AbstractContextManager[Any]]

_pass_kind: contextvars.ContextVar[PassKind] = contextvars.ContextVar("robplug_pass", default="evaluation")


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Returns (N,) cross-entropies in float32; for pixel labels, (N, H, W), the mean of the labelled ones."""
    if y.dim() == 1:
        return F.cross_entropy(logits.float(), y, reduction="none")
    losses = F.cross_entropy(logits.float(), y, reduction="none", ignore_index=IGNORE)
    return losses.flatten(1).sum(1) / (y != IGNORE).flatten(1).sum(1).clamp_min(1)


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """Returns (N,) bool, which samples are right; for pixel labels, (N, H, W), the share of the labelled ones."""
    right = logits.detach().argmax(1) == y
    if y.dim() == 1:
        return right
    labelled = y != IGNORE
    return (right & labelled).flatten(1).sum(1) / labelled.flatten(1).sum(1).clamp_min(1)


@dataclass(frozen=True)
class Pass:
    """A forward pass.

    Attributes:
        x: (N, ...) the samples, a leaf that requires a gradient: ``torch.autograd.grad(p.loss.sum(), p.x)``. Take input
            gradients of the sum: those of the mean shrink with the batch and underflow in half precision.
        logits: (N, C), of a segmentation network (N, C, H, W); a detector has none of an image, and this is (N, 0).
        loss: (N,) float32, the loss of each sample.
        activations: outputs of the layers that the defences of the stack asked for, by name.
        observed: what each observer of the stack's defences has yielded, by observer; empty for a part of a pass.
    """

    x: Tensor
    logits: Tensor
    loss: Tensor
    activations: Mapping[str, Tensor]
    observed: Mapping[Observer, Any] = field(default_factory=dict)


@dataclass
class Step:
    """One batch in training.

    Attributes:
        model: maps samples inside ``bounds`` to logits; everything that a user put in front of the network is in it.
        x: (N, ...) samples.
        y: labels as in `robplug.data.Dataset`.
        rng: a stream per sample, other ones in each step.
        bounds: smallest and largest value of a sample.
        state: what the ``prepare`` of the defence that is asked returned as its state.
        x_adv: (N, ...) the adversarial samples of the objective, if it has any.
        loss_of: (logits, y) to (N,), the loss that is trained; a detector has its own, ``model.losses``.
        task: what ``y`` are labels of.
        layers: modules whose outputs are kept in each `Pass`, by name.
        observers: entered around the forward of each `Pass`.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    rng: Rng
    bounds: tuple[float, float] = (0.0, 1.0)
    state: Any = None
    x_adv: Tensor | None = None
    loss_of: Loss = cross_entropy
    task: Task = "classification"
    layers: Mapping[str, nn.Module] = field(default_factory=dict)
    observers: Sequence[Observer] = ()
    _passes: dict[str, Pass] = field(default_factory=dict, init=False, repr=False)

    def renew(self, x: Tensor) -> None:
        """Puts other samples in the place of ``x``; passes made so far are forgotten."""
        self.x = x
        self._passes.clear()

    def clean(self) -> Pass:
        """Returns the pass of ``x``, made when first asked for and shared by all who ask."""
        return self._shared("clean", self.x)

    def adv(self) -> Pass:
        """Returns the pass of ``x_adv``, made when first asked for and shared by all who ask.

        Raises:
            InputError: the objective of the stack has no adversarial samples.
        """
        if self.x_adv is None:
            raise InputError("an objective that sets step.x_adv", "none", 'put "robplug/at" or the like into the stack')
        return self._shared("adv", self.x_adv)

    def together(self, *parts: tuple[Tensor, Tensor]) -> list[Pass]:
        """Makes one forward pass over several kinds of samples, as one batch.

        Args:
            *parts: of each kind the samples, (M, ...), and their labels, (M,).

        Returns:
            What each kind would have as a `Pass` of its own.
        """
        leaves = [x.detach().requires_grad_() for x, _ in parts]
        sizes = [len(x) for x in leaves]
        whole = self._forward(torch.cat(leaves), torch.cat([y for _, y in parts]))
        kept = {name: output.split(sizes) for name, output in whole.activations.items()}
        rest = zip(leaves, whole.logits.split(sizes), whole.loss.split(sizes), strict=True)
        return [Pass(*of, {name: outputs[k] for name, outputs in kept.items()}) for k, of in enumerate(rest)]

    def give(self, *, clean: Pass | None = None, adv: Pass | None = None) -> None:
        """Shares passes that an objective made in its own way: `clean` and `adv` return them from now on.

        Raises:
            InputError: a pass is not one of the whole batch.
        """
        for name, made in (("adv", adv), ("clean", clean)):
            if made is None:
                continue
            if len(made.logits) != len(self.y):
                remedy = "keep it: who asks for the whole batch gets another pass"
                raise InputError(f"a pass of all {len(self.y)} samples as {name}", len(made.logits), remedy)
            self._passes[name] = made

    def right(self) -> Tensor | None:
        """Returns (N,) what the newest pass so far got right, as `accuracy` says; None before any, and for a detector.

        Of two passes given together the clean one counts.
        """
        if not self._passes or self.task == "detection":
            return None
        newest = list(self._passes.values())[-1]
        return accuracy(newest.logits, self.y)

    def _shared(self, name: str, x: Tensor) -> Pass:
        if name not in self._passes:
            self._passes[name] = self._forward(x.detach().requires_grad_(), self.y)
        return self._passes[name]

    def _forward(self, x: Tensor, y: Tensor) -> Pass:
        activations: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for name, layer in self.layers.items():
                handle = layer.register_forward_hook(_keeper(activations, name))
                stack.callback(handle.remove)
            observed = {observer: stack.enter_context(observer()) for observer in self.observers}
            if self.task == "detection":
                return Pass(x, x.new_zeros(len(x), 0), self.model.losses(x, y), activations, observed)  # type: ignore[operator]
            logits = self.model(x)
        return Pass(x, logits, self.loss_of(logits, y), activations, observed)


def _keeper(activations: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any, Tensor], None]:
    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        activations[name] = output

    return keep


def current_pass() -> PassKind:
    """Returns who is asking the model: ``"attacker"``, ``"update"`` (training) or ``"evaluation"`` (anybody else).

    For layers that behave differently under attack, called in their ``forward``.
    """
    return _pass_kind.get()


@contextmanager
def passing(kind: PassKind) -> Iterator[None]:
    """Makes `current_pass` return ``kind`` inside."""
    token = _pass_kind.set(kind)
    try:
        yield
    finally:
        _pass_kind.reset(token)


@contextmanager
def attacking(model: nn.Module, batch_norm: Literal["eval", "train"] = "eval") -> Iterator[None]:
    """Inside, the model is as an attack should see it: in eval mode, no buffer changes.

    Args:
        model: gets its modes back afterwards.
        batch_norm: ``"train"`` lets batch norm use the statistics of the batch.
    """
    with passing("attacker"), evaluation_mode(model), untouched_buffers(model):
        for part in model.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.training = batch_norm == "train"
        yield


@contextmanager
def untouched_buffers(model: nn.Module) -> Iterator[None]:
    """Inside, the model works on copies of its buffers: running statistics move and are forgotten.

    The buffers themselves are not written, because a graph made before may hold them for its backward pass.
    """
    kept = [(part, name, buffer) for part in model.modules() for name, buffer in part._buffers.items()]
    for part, name, buffer in kept:
        part._buffers[name] = None if buffer is None else buffer.clone()
    try:
        yield
    finally:
        for part, name, buffer in kept:
            part._buffers[name] = buffer

"""The seam of training: what a defence may do, and a stack of defences at work on one batch.

`robplug.training.fit` and the ART trainer both train through `Stack`; they differ in where batches and optimizer
come from.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robplug.errors import InputError
from robplug.plugins import registry
from robplug.step import Observer, Step, accuracy, passing, untouched_buffers

AUGMENTATION = 1 << 32
"""Restarts of the streams from here on belong to augmentation."""


@dataclass(frozen=True)
class Prepared:
    """What `Defense.prepare` did.

    Attributes:
        state: anything; it comes back as ``step.state`` and is no part of the model. A network in it (a frozen
            teacher) is neither optimized nor saved nor switched between modes.
        parameters: new parameters, in the model or in the state, that are to be optimized.
        no_decay: parameters, new or the model's own, that escape weight decay.
        layers: names of modules of the model whose outputs each `robplug.step.Pass` is to keep.
        observer: entered around the forward of each `robplug.step.Pass`, which keeps what it yields under the observer:
            ``step.clean().observed[observer]``. For what outputs of modules do not tell.
    """

    state: Any = None
    parameters: Sequence[nn.Parameter] = ()
    no_decay: Sequence[nn.Parameter] = ()
    layers: Sequence[str] = ()
    observer: Observer | None = None


class Defense:
    """A defence in training; derive a frozen dataclass whose fields are its parameters, and override what it needs.

    A step of a stack: every `augment`, in order; the one `objective`, which alone moves batch norm's running
    statistics; then every `penalty`; their sum is differentiated and the optimizer steps; then every `after_step`.
    Random draws come from ``step.rng``.

    Attributes:
        gives_way: whether its `objective` is the plain one, made in a way of its own, in whose place that of another
            defence of the stack may come.
        patience: epochs without a better `score` after which training stops and the best weights are taken; None, the
            default, never stops. A field of the defence where a user is to choose it.
    """

    gives_way: bool = False
    patience: int | None = None

    def prepare(self, model: nn.Module) -> Prepared:
        """Changes the model in place before training; its parameters stay the same objects."""
        return Prepared()

    def augment(self, step: Step) -> Tensor:
        """Returns the samples, (N, ...), to be trained on in place of ``step.x``; the labels stay."""
        return step.x

    def objective(self, step: Step) -> Tensor:
        """Returns the main loss, a scalar; one defence of a stack may override it, besides those that give way.

        An objective on adversarial samples sets ``step.x_adv`` and asks for ``step.adv()``, so that penalties can too.
        One that passes several kinds of samples at once makes the pass with ``step.together`` and shares its parts by
        ``step.give``.
        """
        return step.clean().loss.mean()

    def penalty(self, step: Step) -> Tensor | tuple[Tensor, Tensor] | None:
        """Returns what is added to the main loss: a scalar, or (value to log, scalar to differentiate); or None.

        Running statistics of batch norm that move meanwhile are forgotten.
        """
        return None

    def mode(self, model: nn.Module) -> None:
        """Called after each ``model.train()``: freezes batch norm, say."""

    def after_step(self, model: nn.Module) -> None:
        """Called after each step of the optimizer: projects weights, say."""

    def finish(self, model: nn.Module) -> nn.Module:
        """Undoes surgery that is not to stay; returns the model to be used."""
        return model

    def score(self, step: Step) -> Tensor | None:
        """Returns (N,) bool, which held-out samples count as right; None leaves it to clean accuracy.

        The model is in eval mode.
        """
        return None


@dataclass(frozen=True)
class NoDefense(Defense):
    """Plain training."""


@dataclass(frozen=True)
class Losses:
    """The losses of one step.

    Attributes:
        objective: the main loss, a scalar.
        penalties: their values, by the name of the defence's class.
        total: what is differentiated.
        right: (N,) what the objective's pass got right, as it saw the samples (`robplug.step.accuracy`); None if
            unknown.
    """

    objective: Tensor
    penalties: Mapping[str, Tensor]
    total: Tensor
    right: Tensor | None


class Stack:
    """Defences that train one model together.

    Args:
        defenses: a name of ``robplug list defenses``, a Defense, or several of either.

    Raises:
        InputError: two of them have an objective, or something else is no defence.
    """

    def __init__(self, defenses: str | Defense | Iterable[str | Defense] = ()) -> None:
        several = [defenses] if isinstance(defenses, str | Defense) else list(defenses)
        self.defenses: list[Defense] = [registry().defense(item) if isinstance(item, str) else item for item in several]
        for defense in self.defenses:
            if not isinstance(defense, Defense):
                raise InputError("a defence derived from robplug.defenses.Defense", repr(defense))
        able = [index for index, defense in enumerate(self.defenses) if _has_objective(defense)]
        main = [index for index in able if not self.defenses[index].gives_way]
        if len(main) > 1:
            names = " and ".join(type(self.defenses[index]).__name__ for index in main)
            raise InputError("at most one defence with an objective in a stack", names, "train with one of them")
        if not self.defenses:
            self.defenses.append(NoDefense())
        self._main = [*main, *able, 0][0]  # without an objective among them, that of any is the plain one
        self._prepared: list[Prepared] = []
        self._layers: dict[str, nn.Module] = {}

    def prepare(self, model: nn.Module) -> None:
        """Lets every defence prepare the model.

        Raises:
            InputError: a parameter of the model was replaced, a new one was not announced, or a layer does not exist.
        """
        self.model = model
        for defense in self.defenses:
            before = {id(parameter): name for name, parameter in model.named_parameters()}
            prepared = defense.prepare(model)
            _check_surgery(defense, model, before, prepared)
            self._prepared.append(prepared)
            self._layers.update({name: _layer(model, name, defense) for name in prepared.layers})

    @property
    def new_parameters(self) -> list[nn.Parameter]:
        """The parameters that the defences announced."""
        return [parameter for prepared in self._prepared for parameter in prepared.parameters]

    @property
    def no_decay(self) -> list[nn.Parameter]:
        """The parameters that escape weight decay."""
        return [parameter for prepared in self._prepared for parameter in prepared.no_decay]

    @property
    def patience(self) -> int | None:
        """The smallest patience of the defences."""
        return min((defense.patience for defense in self.defenses if defense.patience is not None), default=None)

    def train_mode(self) -> None:
        """Puts the model into train mode, as the defences want it."""
        self.model.train()
        for defense in self.defenses:
            defense.mode(self.model)

    def train_batch(
        self,
        step: Step,
        optimizer: torch.optim.Optimizer,
        backward: Callable[[Tensor], Any] = Tensor.backward,
        autocast: AbstractContextManager[Any] | None = None,
    ) -> Losses:
        """Makes one step of training.

        Args:
            step: the batch.
            optimizer: of the model's parameters and the announced ones.
            backward: differentiates the total loss.
            autocast: entered for all forward passes.
        """
        optimizer.zero_grad()
        with passing("update"), autocast or nullcontext():
            losses = self.losses(step)
        backward(losses.total)
        optimizer.step()
        for defense in self.defenses:
            defense.after_step(self.model)
        return losses

    def losses(self, step: Step) -> Losses:
        """Returns the losses of a batch; batch norm's running statistics move with the objective alone."""
        step.layers = self._layers
        step.observers = [prepared.observer for prepared in self._prepared if prepared.observer]
        rng = step.rng
        with untouched_buffers(self.model):
            for place, (defense, prepared) in enumerate(zip(self.defenses, self._prepared, strict=True)):
                # streams of their own: an attack's random start begins those of step.rng again
                step.state, step.rng = prepared.state, rng.at_restart(AUGMENTATION + place)
                step.renew(defense.augment(step))
        step.rng = rng
        step.state = self._prepared[self._main].state
        objective = self.defenses[self._main].objective(step)
        right = step.right()
        total = objective
        values: dict[str, Tensor] = {}
        with untouched_buffers(self.model):
            for defense, prepared in zip(self.defenses, self._prepared, strict=True):
                step.state = prepared.state
                penalty = defense.penalty(step)
                if penalty is None:
                    continue
                value, surrogate = penalty if isinstance(penalty, tuple) else (penalty, penalty)
                total = total + surrogate
                name = type(defense).__name__
                values[name] = values.get(name, torch.zeros_like(value)) + value.detach()
        return Losses(objective.detach(), values, total, right)

    def score(self, step: Step) -> Tensor:
        """Returns (N,) what the first defence with an opinion counts as right, else the `accuracy` of clean samples."""
        step.layers = self._layers
        for defense, prepared in zip(self.defenses, self._prepared, strict=True):
            step.state = prepared.state
            right = defense.score(step)
            if right is not None:
                return right
        with torch.no_grad():
            return accuracy(step.model(step.x), step.y)

    def finish(self) -> nn.Module:
        """Lets every defence finish, the last first, and returns the model."""
        for defense in reversed(self.defenses):
            self.model = defense.finish(self.model)
        return self.model


def _has_objective(defense: Defense) -> bool:
    return type(defense).objective is not Defense.objective


def _check_surgery(defense: Defense, model: nn.Module, before: Mapping[int, str], prepared: Prepared) -> None:
    name = type(defense).__name__
    after = {id(parameter): key for key, parameter in model.named_parameters()}
    lost = [key for ident, key in before.items() if ident not in after]
    if lost:
        raise InputError(f"{name}.prepare to keep the model's parameters", f"without {', '.join(lost)}")
    known = {*before, *(id(parameter) for parameter in prepared.parameters)}
    silent = [key for ident, key in after.items() if ident not in known]
    if silent:
        remedy = "announce them in Prepared.parameters"
        raise InputError(f"{name}.prepare to announce all new parameters", f"also {', '.join(silent)}", remedy)


def _layer(model: nn.Module, name: str, defense: Defense) -> nn.Module:
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=3) or [key for key in modules if key][:10]
        expected = f"a layer of {type(model).__name__} for {type(defense).__name__}"
        raise InputError(expected, repr(name), f"there is {', '.join(near)}")
    return modules[name]

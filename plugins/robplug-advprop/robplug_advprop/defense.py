"""Training on clean and adversarial samples together: with the statistics of each apart, and the control without."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robplug.defenses import Defense, Prepared
from robplug.step import Step
from robplug_advprop.attackers import Attacker, Name
from robplug_advprop.layers import MixtureBatchNorm
from robplug_advprop.routing import route
from robplug_advprop.surgery import convert, drop_auxiliary


@dataclass(frozen=True)
class VanillaMixing(Defense):
    """Trains on every batch and its adversarial counterpart in one pass, all through the same batch norm.

    The control of `AdvProp`: the same data, the same loss, one set of statistics. The attack sees the network in eval
    mode, and leaves every buffer as it was.

    Source: Xie et al. 2020, Adversarial Examples Improve Image Recognition, eq. 3.

    Attributes:
        eps: radius of the attack in units of the data; the paper has 1 to 4 of 255.
        attack: ``"pgd"``, ``"gd"`` (not projected) or ``"i-fgsm"`` (no random start).
        steps: of the attack; None means eps / step_size + 1, or 1 if eps is no longer than a step.
        step_size: length of a step.
        average: halve the loss, so that its scale is that of clean training.
    """

    eps: float = 4 / 255
    attack: Name = "pgd"
    steps: int | None = None
    step_size: float = 1 / 255
    average: bool = False

    def __post_init__(self) -> None:
        self._attacker()

    def objective(self, step: Step) -> Tensor:
        """Returns the sum (the mean if ``average``) of the mean losses of clean and adversarial samples, a scalar."""
        count = len(step.x)
        with self._routed(step.model, 1):
            step.x_adv = self._attacker().run(step)
        with self._routed(step.model, [count, count]):
            logits = step.model(torch.cat([step.x, step.x_adv]))
        clean, adversarial = step.loss_of(logits, step.y.repeat(2)).split(count)
        total: Tensor = clean.mean() + adversarial.mean()
        return total / 2 if self.average else total

    def _attacker(self) -> Attacker:
        return Attacker(self.attack, self.eps, self.steps, self.step_size)

    def _routed(self, model: nn.Module, way: int | list[int]) -> AbstractContextManager[None]:
        return nullcontext()


@dataclass(frozen=True)
class AdvProp(VanillaMixing):
    """Trains on every batch and its adversarial counterpart, each through batch norm of its own.

    The network gets auxiliary batch norm before training and loses it afterwards: what remains is an ordinary network.
    The attack is one on the auxiliary statistics in eval mode, and leaves every buffer as it was. Then clean and
    adversarial samples go through the network in one pass, the former through the main statistics. Penalties of other
    defences see the main ones. The parameters are those of `VanillaMixing`.

    Source: Xie et al. 2020, Adversarial Examples Improve Image Recognition, algorithm 1 (algorithm 2 of the
        dissertation): the sum of both losses, which some code averages.
    """

    def prepare(self, model: nn.Module) -> Prepared:
        """Converts the model."""
        convert(model)
        layers = [part for part in model.modules() if isinstance(part, MixtureBatchNorm)]
        return Prepared(parameters=[p for layer in layers for p in layer.auxiliary.parameters()])

    def finish(self, model: nn.Module) -> nn.Module:
        """Returns the model without its auxiliary statistics."""
        return drop_auxiliary(model)

    def _routed(self, model: nn.Module, way: int | list[int]) -> AbstractContextManager[None]:
        return route(model, way) if isinstance(way, int) else route(model, sizes=way)

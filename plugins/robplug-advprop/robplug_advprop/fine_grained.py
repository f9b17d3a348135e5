"""AdvProp with several auxiliary statistics, one for each kind of sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from robplug.defenses import Defense, Prepared
from robplug.errors import InputError
from robplug.step import Step
from robplug_advprop import statistics
from robplug_advprop.attackers import Attacker, Name
from robplug_advprop.auto_augment import auto_augment, check_policy
from robplug_advprop.routing import route
from robplug_advprop.statistics import Kept

Source = float | str | Callable[[Step], Tensor]


@dataclass(frozen=True)
class FineGrained(Defense):
    """Trains on every batch and on several changed copies of it, each copy through batch norm of its own.

    The unchanged batch goes through the main statistics, and all parts through the network in one pass. Adversarial
    copies are made on their own auxiliary statistics in eval mode, which leaves every buffer as it was. Penalties of
    other defences share that pass; the adversarial part that they see is that of the largest radius.

    Source: Xie et al. 2020, Adversarial Examples Improve Image Recognition, sections 4.2 and 5.4 (7.4.2 and 7.5.4 of
        the dissertation).
    Differs: adversarial copies are made of the unchanged batch, since the paper does not say of which.

    Attributes:
        sources: what goes through the auxiliary statistics 1, 2, ...: a number is the radius of an attack,
            ``"imagenet"``, ``"cifar10"`` and ``"svhn"`` are AutoAugment with that policy (by kornia), and a function
            takes the `robplug.step.Step` and returns samples, (N, ...), for its labels. The paper has AutoAugment and
            one attack.
        attack: ``"pgd"``, ``"gd"`` (not projected) or ``"i-fgsm"`` (no random start).
        steps: of each attack; None means radius / step_size + 1, or 1 if the radius is no longer than a step.
        step_size: length of a step.
        average: divide the loss by the number of parts, so that its scale is that of clean training.
        keep: which statistics the trained network has: ``"main"``, a number from 1 for auxiliary ones in their place,
            or ``"all"``: the network stays converted.
    """

    sources: Sequence[Source] = (2 / 255, 4 / 255)
    attack: Name = "pgd"
    steps: int | None = None
    step_size: float = 1 / 255
    average: bool = False
    keep: Kept = "main"

    def __post_init__(self) -> None:
        if isinstance(self.sources, str) or not self.sources:
            raise InputError("a list of at least one source", repr(self.sources))
        for source in self.sources:
            if isinstance(source, str):
                check_policy(source)
            elif not callable(source):
                self._attacker(source)
        statistics.check_kept(self.keep, len(self.sources))

    def prepare(self, model: nn.Module) -> Prepared:
        """Converts the model."""
        return statistics.prepare(model, len(self.sources))

    def objective(self, step: Step) -> Tensor:
        """Returns the sum (the mean if ``average``) of the mean losses of all parts, a scalar."""
        made = [self._samples(step, k, source) for k, source in enumerate(self.sources, start=1)]
        parts = [(x, step.y) for x in (step.x, *made)]
        with route(step.model, sizes=[len(step.x)] * len(parts)):
            passes = step.together(*parts)
        step.give(clean=passes[0])
        radii = {k: source for k, source in enumerate(self.sources) if isinstance(source, int | float)}
        if radii:
            strongest = max(radii, key=lambda k: radii[k])
            step.x_adv = made[strongest]
            step.give(adv=passes[strongest + 1])
        total: Tensor = sum((part.loss.mean() for part in passes[1:]), start=passes[0].loss.mean())
        return total / len(passes) if self.average else total

    def finish(self, model: nn.Module) -> nn.Module:
        """Returns the model with the statistics that are to stay."""
        return statistics.finish(model, self.keep)

    def _samples(self, step: Step, k: int, source: Source) -> Tensor:
        if isinstance(source, str):
            return auto_augment(step, source)
        if callable(source):
            return source(step)
        with route(step.model, k):
            return self._attacker(source).run(step)

    def _attacker(self, eps: float) -> Attacker:
        return Attacker(self.attack, eps, self.steps, self.step_size)

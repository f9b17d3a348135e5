"""Training on clean and adversarial samples together: with the statistics of each apart, and the control without."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robplug.defenses import Defense, Prepared
from robplug.errors import InputError
from robplug.step import Step
from robplug_advprop import statistics
from robplug_advprop.attackers import Attacker, Goal, Name
from robplug_advprop.routing import route
from robplug_advprop.statistics import Kept


@dataclass(frozen=True)
class VanillaMixing(Defense):
    """Trains on every batch and its adversarial counterpart in one pass, all through the same batch norm.

    The control of `AdvProp`: the same data, the same loss, one set of statistics. The attack sees the network in eval
    mode, and leaves every buffer as it was.

    Source: Xie et al. 2020, Adversarial Examples Improve Image Recognition, eq. 3; the ratio of clean images Xie and
        Yuille 2020, Intriguing Properties of Adversarial Training at Scale, section 4.1, which does not say how the
        losses are weighted then: each image weighs the same here.

    Attributes:
        eps: radius of the attack in units of the data; the paper has 1 to 4 of 255.
        attack: ``"pgd"``, ``"gd"`` (not projected) or ``"i-fgsm"`` (no random start).
        steps: of the attack; None means eps / step_size + 1, or 1 if eps is no longer than a step.
        step_size: length of a step.
        goal: the attack leaves the label (``"untargeted"``), or makes for a random wrong class (``"random"``).
        clean_ratio: share of the clean samples that are trained on, from 0 to 1; the first ones of each batch, which is
            in random order. All adversarial samples are.
        average: divide the loss, so that its scale is that of clean training.
    """

    eps: float = 4 / 255
    attack: Name = "pgd"
    steps: int | None = None
    step_size: float = 1 / 255
    goal: Goal = "untargeted"
    clean_ratio: float = 1.0
    average: bool = False

    def __post_init__(self) -> None:
        self._attacker()
        if not 0 <= self.clean_ratio <= 1:
            raise InputError("clean_ratio from 0 to 1", self.clean_ratio)

    def objective(self, step: Step) -> Tensor:
        """Returns the sum of the losses of clean and adversarial samples, over the size of the batch, a scalar.

        With all clean samples, that is the sum of the mean losses of both kinds. If ``average``, it is the mean over
        all samples instead.
        """
        count = len(step.x)
        clean = round(self.clean_ratio * count)
        with self._routed(step.model, 1):
            step.x_adv = self._attacker().run(step)
        parts = [(step.x[:clean], step.y[:clean]), (step.x_adv, step.y)]
        with self._routed(step.model, [clean, count] if clean else 1):
            passes = step.together(*parts) if clean else step.together(parts[1])
        step.give(clean=passes[0] if clean == count else None, adv=passes[-1])
        total = torch.stack([made.loss.sum() for made in passes]).sum()
        return total / (clean + count if self.average else count)

    def _attacker(self) -> Attacker:
        return Attacker(self.attack, self.eps, self.steps, self.step_size, self.goal)

    def _routed(self, model: nn.Module, way: int | list[int]) -> AbstractContextManager[None]:
        return nullcontext()


@dataclass(frozen=True)
class AdvProp(VanillaMixing):
    """Trains on every batch and its adversarial counterpart, each through batch norm of its own.

    The network gets auxiliary batch norm before training and loses it afterwards: what remains is an ordinary network.
    One that was converted before, with one set of auxiliary statistics, is trained on as it is. The attack is one on
    the auxiliary statistics in eval mode, and leaves every buffer as it was. Then clean and adversarial samples go
    through the network in one pass, the former through the main statistics. Penalties of other defences share that
    pass; another one that they make is through the main statistics. The other parameters are those of `VanillaMixing`.

    Source: Xie et al. 2020, Adversarial Examples Improve Image Recognition, algorithm 1 (algorithm 2 of the
        dissertation): the sum of both losses, which some code averages.

    Attributes:
        keep: which statistics the trained network has: ``"main"``, 1 for the auxiliary ones in their place, or
            ``"all"``: the network stays converted.
    """

    keep: Kept = "main"

    def __post_init__(self) -> None:
        super().__post_init__()
        statistics.check_kept(self.keep, auxiliary=1)
        if self.clean_ratio == 0 and self.keep != 1:
            remedy = "keep=1: the main statistics would never see a sample"
            raise InputError("clean_ratio > 0", f"0 with keep={self.keep!r}", remedy)

    def prepare(self, model: nn.Module) -> Prepared:
        """Converts the model."""
        return statistics.prepare(model, auxiliary=1)

    def finish(self, model: nn.Module) -> nn.Module:
        """Returns the model with the statistics that are to stay."""
        return statistics.finish(model, self.keep)

    def _routed(self, model: nn.Module, way: int | list[int]) -> AbstractContextManager[None]:
        return route(model, way) if isinstance(way, int) else route(model, sizes=way)


@dataclass(frozen=True)
class Mixture(AdvProp):
    """Adversarial training with mixture batch norm: `AdvProp` as a way to robustness, with the attack of that paper.

    Robust is the network on its auxiliary statistics (MBN_adv), which therefore remain; ``keep="main"`` gives MBN_clean
    and ``keep="all"`` both. The other parameters are those of `VanillaMixing`.

    Source: Xie and Yuille 2020, Intriguing Properties of Adversarial Training at Scale, sections 3 and 4.2 (chapter 6
        of the dissertation), eq. 1 with alpha = 0.5.
    Differs: the attack always starts at a random point, where the paper's starts at the image itself with probability
        0.2; the goal is never the label itself.

    Attributes:
        keep: as in `AdvProp`.
    """

    eps: float = 16 / 255
    steps: int | None = 30
    goal: Goal = "random"
    average: bool = True
    keep: Kept = 1

"""Adversarial training with PGD, the defence ``robplug/at``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from robplug.attacks import PGD
from robplug.defenses import Defense
from robplug.errors import InputError
from robplug.plugins import registry
from robplug.rng import Rng
from robplug.step import Step, attacking
from robplug.targets import Target
from robplug.types import ThreatModel

Goal = Literal["untargeted", "random", "least-likely"]
Mode = Literal["eval", "train"]


@dataclass(frozen=True)
class AdversarialTraining(Defense):
    """Training on samples that PGD has moved.

    Source: Madry et al. 2018, section 2.1, eq. 2.1; targeted goals Kurakin et al. 2017, section 2.3; early stopping
    Rice et al. 2020, section 3.

    Attributes:
        eps: radius of the attack in units of the data.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        steps: gradient steps of the attack.
        step_size: length of a step; None means 2.5 * eps / steps.
        random_start: start from a random point of the ball.
        clean_share: share of the batches, drawn at random, that are left as they are.
        goal: the attack leaves the label (``"untargeted"``), or makes for a class drawn uniformly from the wrong ones
            (``"random"``) or for the wrong class of the smallest logit (``"least-likely"``).
        label_smoothing: share of the label spread over all classes; above 0 the loss is the smoothed cross-entropy.
        attack_mode: ``"train"`` lets batch norm use the batch's statistics in the attack; all else, dropout included,
            is in eval mode, and no running statistic moves.
        patience: epochs without a better robust accuracy on held-out samples (untargeted PGD of the same steps) after
            which training stops with the best weights; None trains all epochs.
    """

    eps: float = 8 / 255
    norm: str = "linf"
    steps: int = 7
    step_size: float | None = None
    random_start: bool = True
    clean_share: float = 0.0
    goal: Goal = "untargeted"
    label_smoothing: float = 0.0
    attack_mode: Mode = "eval"
    patience: int | None = None

    def __post_init__(self) -> None:
        for name, known in (("goal", get_args(Goal)), ("attack_mode", get_args(Mode))):
            if getattr(self, name) not in known:
                raise InputError(f"{name} to be one of {', '.join(known)}", repr(getattr(self, name)))
        for name in ("clean_share", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} from 0 to 1", getattr(self, name))
        if self.steps < 1:
            raise InputError("steps >= 1", self.steps)
        if self.patience is not None and self.patience < 1:
            raise InputError("patience >= 1, or None", self.patience)
        ThreatModel(self.norm, self.eps)

    def objective(self, step: Step) -> Tensor:
        """Returns the mean loss of the adversarial samples."""
        step.x_adv = step.x if self._leaves_clean(step.rng) else self._attack(step, self.goal, self.attack_mode)
        adv = step.adv()
        if self.label_smoothing:
            return F.cross_entropy(adv.logits.float(), step.y, label_smoothing=self.label_smoothing)
        return adv.loss.mean()

    def score(self, step: Step) -> Tensor:
        """Returns (N,) bool: samples still classified correctly after untargeted PGD."""
        x_adv = self._attack(step, "untargeted", "eval")
        with torch.no_grad():
            return torch.eq(step.model(x_adv).argmax(1), step.y)

    def _leaves_clean(self, rng: Rng) -> bool:
        return bool(np.random.default_rng(rng.batch_seed()).random() < self.clean_share)

    def _attack(self, step: Step, goal: Goal, mode: Mode) -> Tensor:
        with attacking(step.model, mode):
            target = registry().target(step.model, bounds=step.bounds)
            y_goal = None if goal == "untargeted" else _goals(target, step, goal)
            threat = ThreatModel(self.norm, self.eps, step.bounds, targeted=y_goal is not None)
            pgd = PGD(self.steps, self.step_size, self.random_start, early_stop=False)
            return pgd.run(target, step.x, step.y, threat, step.rng, y_goal=y_goal).x_adv


@torch.no_grad()
def _goals(target: Target, step: Step, goal: Goal) -> Tensor:
    """Returns (N,) wrong classes."""
    if goal == "least-likely":
        return target.logits(step.x).scatter(1, step.y[:, None], torch.inf).argmin(1)
    classes = target.count_classes(step.x)
    return (step.y + 1 + step.rng.integers(classes - 1, device=step.y.device)) % classes

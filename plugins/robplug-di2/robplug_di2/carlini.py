"""D-C&W: Carlini and Wagner's l2 attack with diverse inputs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from robplug.attacks import make_problem
from robplug.carlini import CarliniWagner, check_minimal
from robplug.rng import Rng
from robplug.targets import Target
from robplug.types import Perturbed, ThreatModel
from robplug_di2.diversity import InputDiversity


@dataclass(frozen=True)
class DiverseCarliniWagner(InputDiversity):
    """D-C&W: minimises |delta|^2 + c * max(confidence - lead, 0), where the lead is seen on diverse inputs.

    The lead is the largest other logit minus the label's, or for a goal the goal's minus the largest other. delta is
    measured in widths of the bounds, x_adv moves as a tanh, Adam takes all steps for each c, and a binary search over c
    follows. Of all iterates the nearest is returned whose lead on the image itself, not on a diverse one, reaches the
    confidence; where none does, that of the largest lead.

    Source: Xie et al. 2019, table 3.2 of the first author's dissertation; Carlini and Wagner 2017, section VI.A, with
        the constants' search of their code.
    Differs: the paper's experiment has ``confidence=10``; that is no search for the smallest distance, which is what
        a threat without eps asks for. With p = 0 it is C&W itself.

    Attributes:
        steps: of Adam for each constant.
        step_size: learning rate of Adam.
        confidence: lead in logits that is aimed at.
        binary_search_steps: number of constants c.
        initial_const: first c; without success it grows tenfold.
    """

    steps: int = 250
    step_size: float = 0.01
    confidence: float = 0.0
    binary_search_steps: int = 5
    initial_const: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self._search((0.0, 1.0))  # refuses what makes no sense

    def run(
        self,
        target: Target,
        x: Tensor,
        y: Tensor | None,
        threat: ThreatModel,
        rng: Rng,
        *,
        y_goal: Tensor | None = None,
    ) -> Perturbed:
        """Attacks images (N, C, H, W), or with p = 0 samples of any shape, under an l2 threat without eps.

        Raises:
            InputError: a tensor does not fit, or the model takes no images of the padded size.
            ThreatError: the norm is not l2, there is an eps, or the target has no gradients.
        """
        check_minimal(threat, "di2/m-di2-fgsm")
        with self.explaining(target, x):
            return self._search(threat.bounds).search(make_problem(target, x, y, threat, rng, y_goal))

    def _search(self, bounds: tuple[float, float]) -> CarliniWagner:
        return CarliniWagner(
            steps=self.steps,
            step_size=self.step_size,
            confidence=self.confidence,
            binary_search_steps=self.binary_search_steps,
            initial_const=self.initial_const,
            abort_early=False,  # the loss of diverse inputs stalls by chance
            transform=partial(self, bounds=bounds) if self.p else None,
        )

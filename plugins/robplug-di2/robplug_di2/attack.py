"""The family of fast gradient sign methods with momentum and diverse inputs: one loop, told apart by parameters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from robplug.attacks import make_problem, radius
from robplug.errors import InputError, ThreatError
from robplug.loop import Steps, ascend
from robplug.rng import Rng
from robplug.targets import Target
from robplug.types import Perturbed, ThreatModel
from robplug_di2.diversity import InputDiversity


@dataclass(frozen=True)
class MomentumDiverseFGSM(InputDiversity):
    """M-DI2-FGSM: signed steps along the accumulated gradients of diverse inputs, always all of them.

    With p = 0 it is MI-FGSM, with momentum 0 DI2-FGSM, with both I-FGSM, and that with one step of length eps is FGSM.
    No sample leaves early, as one that is broken here may still not transfer; the last iterate is returned unseen.

    Source: Xie et al. 2019, eq. 3 to 7 and figure 2; steps and their length from Kurakin et al. 2017.
    Differs: gradients are divided by their mean absolute value instead of their l1 norm, a constant factor that a sign
        does not see. See `InputDiversity` for the draws.

    Attributes:
        steps: number of gradient steps; None means min(eps + 4, 1.25 eps) with eps in 255ths of the bounds' width,
            rounded down, and at least 1.
        step_size: length of a step in units of the data; None means a 255th of the bounds' width.
        momentum: share mu of the accumulated gradient that is kept.
        draws: number of transforms whose gradients are averaged in a step.
        random_start: begin at a random point of the ball, as torchattacks can.
    """

    steps: int | None = None
    step_size: float | None = None
    momentum: float = 1.0
    draws: int = 1
    random_start: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < float("inf"):
            raise InputError("a finite momentum >= 0", self.momentum)
        self._steps(8 / 255, (0.0, 1.0))  # refuses what makes no sense

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
        """Attacks images (N, C, H, W), or with p = 0 samples of any shape, in the ball of linf.

        Raises:
            InputError: a tensor does not fit, or the model takes no images of the padded size.
            ThreatError: the norm is not linf, there is no eps, or the target has no gradients.
        """
        if threat.norm != "linf":
            raise ThreatError(f"expected a threat with norm linf, got {threat.norm!r}; its steps are signs")
        how = self._steps(radius(threat), threat.bounds)
        with self.explaining(target, x):
            return ascend(make_problem(target, x, y, threat, rng, y_goal), how)

    def _steps(self, eps: float, bounds: tuple[float, float]) -> Steps:
        width = bounds[1] - bounds[0]
        levels = 255 * eps / width
        steps = max(1, int(min(levels + 4, 1.25 * levels) + 1e-9)) if self.steps is None else self.steps
        return Steps(
            steps=steps,
            step_size=width / 255 if self.step_size is None else self.step_size,
            momentum=self.momentum,
            random_start=self.random_start,
            early_stop=False,
            transform=partial(self, bounds=bounds) if self.p else None,
            draws=self.draws,
        )


@dataclass(frozen=True)
class DiverseFGSM(MomentumDiverseFGSM):
    """DI2-FGSM: `MomentumDiverseFGSM` without momentum.

    Source: Xie et al. 2019, eq. 5.
    """

    momentum: float = 0.0

"""The frozen records that host and plugins exchange. Nothing here imports torch."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from robplug.errors import ThreatError

if TYPE_CHECKING:
    import torch

    from robplug.rng import Rng
    from robplug.targets import Target

Task = Literal["classification", "segmentation", "detection"]
Needs = Literal["gradients", "scores", "labels"]
Budget = Literal["fixed", "minimal"]
Scope = Literal["sample", "dataset"]
Status = Literal["misclassified", "robust", "broken", "invalid", "error", "unattacked"]


@dataclass(frozen=True)
class ThreatModel:
    """What an attacker may do.

    Args:
        norm: name of an installed norm, such as ``"linf"``.
        eps: radius of the ball in the units of the data; None asks for the smallest distance.
        bounds: smallest and largest value of the data.
        targeted: whether a given class is to be reached (else: any wrong class).

    Raises:
        ThreatError: eps no number, negative or not finite, or bounds not in order.

    Example:
        >>> ThreatModel(norm="linf", eps=8 / 255).bounds
        (0.0, 1.0)
    """

    norm: str
    eps: float | None = None
    bounds: tuple[float, float] = (0.0, 1.0)
    targeted: bool = False

    def __post_init__(self) -> None:
        if self.eps is not None and not isinstance(self.eps, numbers.Real):
            raise ThreatError(f"expected eps to be a number, got {self.eps!r}; such as 8 / 255, without quotes")
        if self.eps is not None and not (math.isfinite(self.eps) and self.eps >= 0):
            raise ThreatError(f"expected eps >= 0 and finite, got {self.eps}; use None for the smallest distance")
        low, high = self.bounds
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ThreatError(f"expected bounds (low, high) with low < high, got {self.bounds}")
        object.__setattr__(self, "bounds", (float(low), float(high)))


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What a plugin says of one thing it offers, before any of it is imported.

    Attributes:
        name: ``origin/method`` in lower case; data sets and norms may be a bare word.
        make: ``module:object``, imported on first use.
        summary: one line for ``robplug list``.
        source: paper, section and equation.
        params: the parameters and their defaults (JSON values).
    """

    name: str
    make: str
    summary: str = ""
    source: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)

    @property
    def origin(self) -> str:
        """The part of the name before the slash."""
        return self.name.partition("/")[0]


@dataclass(frozen=True, kw_only=True)
class AttackSpec(Spec):
    """An attack and what it can do.

    ``make`` names a frozen dataclass with the method ``run`` of `Attack`.

    Attributes:
        norms: threat norms that it serves.
        budget: ``"fixed"`` stays inside a ball, ``"minimal"`` looks for the smallest distance.
        targeted: whether it can reach a given class.
        untargeted: whether it can aim at any wrong class.
        needs: what it asks of the model: ``"gradients"``, ``"scores"`` or ``"labels"``.
        tasks: tasks that it serves.
        stochastic: whether its result depends on random draws.
        scope: ``"sample"`` attacks each sample for itself; ``"dataset"`` must be fitted first.
        canonical: name of the canonical attack that this one implements, such as ``"pgd"``.
        harmonise: ``module:function`` taking (canonical parameters, `ThreatModel`) to own parameters.
    """

    norms: tuple[str, ...] = ("linf",)
    budget: Budget = "fixed"
    targeted: bool = True
    untargeted: bool = True
    needs: Needs = "gradients"
    tasks: tuple[str, ...] = ("classification",)
    stochastic: bool = False
    scope: Scope = "sample"
    canonical: str | None = None
    harmonise: str | None = None


@dataclass(frozen=True, kw_only=True)
class DefenseSpec(Spec):
    """A defence that ``robplug train`` can use; ``make`` names a frozen dataclass (see `Defense`).

    Attributes:
        pieces: which of prepare, augment, objective, penalty, mode, after_step and finish it has.
        tasks: tasks that it serves.
    """

    pieces: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ("classification",)


@dataclass(frozen=True, kw_only=True)
class TargetSpec(Spec):
    """A model, or a way to turn a foreign object into a target.

    With ``accepts``, ``make`` names a function ``(object, **options) -> Target`` that is called for any object
    whose class, or one of its bases, has one of these qualified names; nothing is imported to find out.
    Without, ``make`` names a function of ``params`` that returns a Target or an nn.Module; where ``of`` says so, the
    Targets that it is made of come before them.

    Attributes:
        accepts: qualified class names, such as ``"torch.nn.modules.module.Module"``.
        task: the task of the model.
        of: what other targets it is made of: ``"none"``, ``"one"`` or ``"several"``.
    """

    accepts: tuple[str, ...] = ()
    task: Task = "classification"
    of: Literal["none", "one", "several"] = "none"


@dataclass(frozen=True, kw_only=True)
class DatasetSpec(Spec):
    """A data set; ``make`` names a function of ``params`` and ``split`` that returns a Dataset."""

    task: Task = "classification"


@dataclass(frozen=True, kw_only=True)
class NormSpec(Spec):
    """A norm; ``make`` names an object with the methods of `robplug.norms.Norm`.

    Attributes:
        unit: what one unit of distance is, in words.
    """

    unit: str = "units of the data"


@dataclass(frozen=True)
class Perturbed:
    """What an attack returns.

    Attributes:
        x_adv: shape, dtype and device of x.
        witness: what else a norm needs to measure the distance (a flow, say); first axis N.
        claim: (N,) bool, the attack's own opinion of its success, or None if it has none. It is shown, never used.
        trace: (N, T) what the attack followed step by step, such as the number of targets that are still active, or
            None. It is shown, never used.
    """

    x_adv: torch.Tensor
    witness: torch.Tensor | None = None
    claim: torch.Tensor | None = None
    trace: torch.Tensor | None = None


@dataclass(frozen=True)
class SampleResult:
    """The verdict on one sample of one cell: a row of the store.

    Attributes:
        sample: index in the data set.
        y: true label; of a task with several answers a sample, 1.
        y_goal: class to be reached, or -1.
        prediction: class predicted for the clean sample; of a task with several answers 1 if it is read right, else 0.
        prediction_adv: likewise for x_adv, or -1 where there is none.
        status: the verdict.
        distance: distance as measured by the referee in float64 (nan where there is none).
        excess: how far beyond the tolerated radius the sample lies, else 0.
        claim: the attack's own claim, or None.
        silent: a valid iterate that broke the sample was seen and not returned.
        forwards: rows sent forward, where they can be told apart, else None.
        backwards: likewise backward.
        note: why a sample is invalid or in error, or that it came back as it was.
        measures: what the norm measures beside the distance, by name (nan where the distance is not finite).
        scores: what the task measures of the answers, by name: ``clean.NAME``, and ``adv.NAME`` where there is x_adv.
    """

    sample: int
    y: int
    y_goal: int
    prediction: int
    prediction_adv: int
    status: Status
    distance: float
    excess: float
    claim: bool | None
    silent: bool
    forwards: int | None
    backwards: int | None
    note: str
    measures: dict[str, float] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)


class Attack(Protocol):
    """The protocol of an attack: a frozen dataclass whose fields are its parameters."""

    def run(
        self,
        target: Target,
        x: torch.Tensor,
        y: torch.Tensor | None,
        threat: ThreatModel,
        rng: Rng,
        *,
        y_goal: torch.Tensor | None = None,
    ) -> Perturbed:
        """Attacks a batch.

        Args:
            target: the model under attack.
            x: (N, ...) floating-point samples inside ``threat.bounds``; not to be changed.
            y: (N,) int64 labels; None means the target's own predictions.
            threat: what is allowed.
            rng: the only source of randomness, one stream per sample.
            y_goal: (N,) classes to reach; given if and only if ``threat.targeted``.
        """
        ...

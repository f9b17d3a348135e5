"""Canonical attacks: one set of parameters per attack, compiled for each library that has it.

Each adapter translates these into its library's own parameters, and refuses what its library cannot honour. Step
sizes and radii are in units of the data.
"""

from __future__ import annotations

from dataclasses import dataclass

from robplug.errors import InputError

COUNTS = ("steps", "restarts", "queries", "binary_search_steps", "initial_evals", "max_evals")


class Canonical:
    """What canonical attacks share: counts are at least 1, lengths above 0."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name in COUNTS and not (isinstance(value, int) and value >= 1):
                raise InputError(f"{name} to be a whole number >= 1", repr(value))
            if name == "step_size" and value is not None and not value > 0:
                raise InputError("step_size > 0, or none for the default", repr(value))


@dataclass(frozen=True)
class FGSM(Canonical):
    """Fast gradient sign method (Goodfellow et al. 2015): one step of length eps."""


@dataclass(frozen=True)
class PGD(Canonical):
    """Projected gradient descent (Madry et al. 2018).

    Attributes:
        steps: number of gradient steps.
        step_size: length of a step; None means 2.5 * eps / steps.
        random_start: start from a random point of the ball.
        restarts: number of starts; the best result of each sample is kept.
    """

    steps: int = 20
    step_size: float | None = None
    random_start: bool = True
    restarts: int = 1


@dataclass(frozen=True)
class BIM(Canonical):
    """Basic iterative method (Kurakin et al. 2017): PGD from the sample itself.

    Attributes:
        steps: number of gradient steps.
        step_size: length of a step; None means 2.5 * eps / steps.
    """

    steps: int = 20
    step_size: float | None = None


@dataclass(frozen=True)
class MIFGSM(Canonical):
    """Momentum iterative FGSM (Dong et al. 2018).

    Attributes:
        steps: number of gradient steps.
        step_size: length of a step; None means eps / steps.
        decay: the momentum mu.
    """

    steps: int = 10
    step_size: float | None = None
    decay: float = 1.0


@dataclass(frozen=True)
class DeepFool(Canonical):
    """DeepFool (Moosavi-Dezfooli et al. 2016).

    Attributes:
        steps: largest number of linearisations.
        overshoot: relative step beyond the boundary.
    """

    steps: int = 50
    overshoot: float = 0.02


@dataclass(frozen=True)
class CW(Canonical):
    """Carlini and Wagner's l2 attack (2017).

    Attributes:
        steps: optimiser steps per constant.
        step_size: learning rate of Adam.
        confidence: margin kappa on the logits.
        binary_search_steps: number of constants tried.
        initial_const: first constant c.
    """

    steps: int = 100
    step_size: float = 0.01
    confidence: float = 0.0
    binary_search_steps: int = 5
    initial_const: float = 0.01


@dataclass(frozen=True)
class APGD(Canonical):
    """Auto-PGD on the cross-entropy (Croce and Hein 2020).

    Attributes:
        steps: number of gradient steps.
        restarts: number of random starts.
    """

    steps: int = 20
    restarts: int = 1


@dataclass(frozen=True)
class Square(Canonical):
    """Square attack, scores only (Andriushchenko et al. 2020).

    Attributes:
        queries: largest number of queries per sample.
        p_init: first share of pixels changed.
    """

    queries: int = 200
    p_init: float = 0.8


@dataclass(frozen=True)
class Boundary(Canonical):
    """Boundary attack, decisions only (Brendel et al. 2018).

    Attributes:
        steps: number of steps.
    """

    steps: int = 200


@dataclass(frozen=True)
class HopSkipJump(Canonical):
    """HopSkipJump, decisions only (Chen et al. 2020).

    Attributes:
        steps: number of iterations.
        initial_evals: queries of the first gradient estimate.
        max_evals: queries of the last.
    """

    steps: int = 10
    initial_evals: int = 20
    max_evals: int = 200


CANONICAL: dict[str, type[Canonical]] = {
    "fgsm": FGSM,
    "pgd": PGD,
    "bim": BIM,
    "mi-fgsm": MIFGSM,
    "deepfool": DeepFool,
    "cw": CW,
    "apgd": APGD,
    "square": Square,
    "boundary": Boundary,
    "hop-skip-jump": HopSkipJump,
}

"""The next factor to be tried: orders of magnitude until there is a bracket, then bisection of its logarithm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from robplug.errors import InputError

LARGEST = 10.0
"""The largest factor that is tried, as a multiple of the first."""
SMALLEST = 1e-3
"""The smallest, likewise."""
PRECISION = 1.25
"""How far apart, as a ratio, the factor chosen and one that is too high may be."""


def next_value(name: str, start: float, trials: Sequence[Mapping[str, Any]]) -> float | None:
    """Returns what is to be tried next, or None where the largest factor that is not too high is known well enough.

    Args:
        name: of the factor, for errors.
        start: the first factor.
        trials: those made, in order, with ``value`` and ``too_high``.

    Raises:
        InputError: all factors from ``start`` to `SMALLEST` times that were too high.
    """
    good = [float(trial["value"]) for trial in trials if not trial["too_high"]]
    bad = [float(trial["value"]) for trial in trials if trial["too_high"]]
    if not trials:
        return start
    if not bad:
        return LARGEST * start if len(good) == 1 else None
    if good:
        low, high = max(good), min(bad)
        return math.sqrt(low * high) if high > PRECISION * low else None
    if min(bad) > 2 * SMALLEST * start:  # twice: powers of ten are rounded
        return min(bad) / 10
    remedy = "train with a lower lr, give a larger tolerance, or begin with a trained model"
    raise InputError(f"training to bear {name} = {min(bad):.4g}", "a value too high like all that were tried", remedy)

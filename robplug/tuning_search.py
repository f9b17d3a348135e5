"""The next factor to be tried: orders of magnitude until there is a bracket, then bisection of its logarithm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from robplug.errors import InputError

DECADES = 3
"""How many orders of magnitude the factor may be from the first one."""
PRECISION = 1.25
"""How far apart, as a ratio, the factor chosen and one that is too high may be."""


def next_value(name: str, start: float, trials: Sequence[Mapping[str, Any]]) -> float | None:
    """Returns what is to be tried next, or None where the largest factor that is not too high is known well enough.

    Args:
        name: of the factor, for errors.
        start: the first factor.
        trials: those made, in order, with ``value`` and ``too_high``.

    Raises:
        InputError: all factors from ``start`` to `DECADES` orders of magnitude away were too high, or none was.
    """
    good = [float(trial["value"]) for trial in trials if not trial["too_high"]]
    bad = [float(trial["value"]) for trial in trials if trial["too_high"]]
    if good and bad:
        low, high = max(good), min(bad)
        return math.sqrt(low * high) if high > PRECISION * low else None
    if len(trials) <= DECADES:
        return float(start * 10.0 ** (-len(bad) if bad else len(good)))
    expected = f"{name} to be too high from some value on, within a factor of {10**DECADES} of {start:g}"
    if bad:
        remedy = "train with a lower lr, give a larger tolerance, or begin with a trained model"
        raise InputError(expected, f"{min(bad):g} as too high already", remedy)
    raise InputError(expected, f"{max(good):g} without harm", "this penalty hardly acts on the model; choose by hand")

"""Rates with their uncertainty."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Rate:
    """A share of samples with its 95 % Wilson interval.

    Attributes:
        count: samples that count.
        total: all samples.
        value: count / total, None where there is no sample.
        low: lower end of the interval.
        high: upper end.
    """

    count: int
    total: int
    value: float | None
    low: float
    high: float


def wilson(count: int, total: int) -> Rate:
    """Returns a rate with the score interval of a binomial proportion.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if total == 0:
        return Rate(count, total, None, 0.0, 1.0)
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share = count / total
    centre = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    # the ends are exact where nothing or everything counts; rounding would leave 1e-17 there
    low = 0.0 if count == 0 else (centre - half) / scale
    high = 1.0 if count == total else (centre + half) / scale
    return Rate(count, total, share, low, high)

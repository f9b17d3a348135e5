"""A paired comparison of two attacks."""

from __future__ import annotations

SIGNIFICANT = 0.01
"""Largest p of a difference that is believed."""


def mcnemar(only_first: int, only_second: int) -> float:
    """Returns the two-sided p of McNemar's exact test: samples that one of the two breaks are either's by a fair coin.

    Args:
        only_first: samples that the first attack breaks and the second does not.
        only_second: the other way round; samples on which both agree say nothing.

    Source: McNemar 1947, "Note on the sampling error of the difference between correlated proportions"; exact form by
        the binomial distribution.
    """
    trials = only_first + only_second
    ways = total = 1  # whole numbers: nothing is lost, however many samples
    for heads in range(min(only_first, only_second)):
        ways = ways * (trials - heads) // (heads + 1)
        total += ways
    return min(1.0, 2 * total / (1 << trials))

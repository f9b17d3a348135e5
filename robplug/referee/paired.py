"""Comparing two attacks sample by sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from robplug.referee.rundir import StoredCell

Array = np.ndarray[Any, Any]
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


@dataclass(frozen=True)
class Verdicts:
    """What some cells together say at one radius, an entry a sample of the data set.

    Attributes:
        broken: at least one breaks it.
        answered: at least one gave a valid answer.
    """

    broken: Array
    answered: Array

    @classmethod
    def of(cls, cells: Sequence[StoredCell], eps: float) -> Verdicts:
        """Returns what those of the cells say that are read at this radius; all are of one data set."""
        broken, answered = np.zeros((2, max(cell.expected for cell in cells)), dtype=bool)
        read = [(cell, reading) for cell in cells for reading in cell.readings if reading.eps == eps]
        for cell, reading in read:
            broken[cell.sample] |= cell.broken(reading)
            answered[cell.sample] |= np.isin(cell.status, ("robust", "broken"))
        return cls(broken, answered)


@dataclass(frozen=True)
class Pairs:
    """Two attacks on the samples that both answered."""

    total: int
    only_first: int
    only_second: int

    @classmethod
    def of(cls, first: Verdicts, second: Verdicts) -> Pairs:
        """Compares two attacks."""
        both = first.answered & second.answered
        only = [int((one.broken & ~other.broken & both).sum()) for one, other in ((first, second), (second, first))]
        return cls(int(both.sum()), *only)

    @property
    def p(self) -> float:
        """Of the difference, by McNemar's test."""
        return mcnemar(self.only_first, self.only_second)

    @property
    def first_wins(self) -> bool:
        """Whether the first breaks more, and not by chance."""
        return self.only_first > self.only_second and self.p < SIGNIFICANT

    @property
    def numbers(self) -> dict[str, float]:
        """For programs."""
        return {**vars(self), "p": self.p}

    def told(self, first: str, second: str) -> str:
        """For people."""
        counts = f"{self.only_first} samples fall to {first} alone, {self.only_second} to {second} alone"
        return f"{counts}, of {self.total} (McNemar p = {self.p:.2g})"

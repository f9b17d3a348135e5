"""The worst case over attacks: what all cells together say of each sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from robplug.referee.rundir import Reading, StoredCell
from robplug.referee.wilson import Rate, wilson

UNRESOLVED_LIMIT = 0.01
"""Largest share of unresolved samples with which a headline is given."""
ANSWERS = ("robust", "broken", "misclassified", "unattacked")
"""Statuses that answer the question; invalid and error do not. What has nothing to attack is robust."""


@dataclass(frozen=True)
class Share:
    """What one attack has to do with a worst case.

    Attributes:
        attack: its number.
        breaks: samples that it breaks, at this radius or with an adversarial example inside it found at another.
        alone: those that no other attack breaks.
        unanswered: unresolved samples on which it gave no valid answer.
    """

    attack: int
    breaks: int
    alone: int
    unanswered: int


@dataclass(frozen=True)
class WorstCase:
    """The robust accuracy that is left under all attacks of one threat: an upper bound.

    Attributes:
        subject: number of the subject.
        eps: the radius.
        samples: all samples.
        misclassified: wrong before any attack.
        broken: broken by at least one valid adversarial example of any cell.
        unresolved: broken by none, but not every cell answered.
        robust: broken by none, and every cell answered.
        clean: accuracy before any attack.
        low: robust / samples, with its interval.
        high: (robust + unresolved) / samples, with its interval.
        refused: whether too many samples are unresolved for a headline.
        shares: one entry an attack, in the order of attacks.
    """

    subject: int
    eps: float
    samples: int
    misclassified: int
    broken: int
    unresolved: int
    robust: int
    clean: Rate
    low: Rate
    high: Rate
    refused: bool
    shares: tuple[Share, ...]


@dataclass(frozen=True)
class PerSample:
    """The worst case sample by sample.

    Attributes:
        sample: (N,) indices in the data set; samples without any row are missing.
        status: (N,) misclassified, broken, unresolved or robust.
        attacks: numbers of the attacks, one a row of the matrices.
        breaks: (attacks, N) bool.
        answered: (attacks, N) bool; true where the attack was not asked.
    """

    sample: np.ndarray[Any, Any]
    status: np.ndarray[Any, Any]
    attacks: tuple[int, ...]
    breaks: np.ndarray[Any, Any]
    answered: np.ndarray[Any, Any]


def per_sample(cells: Sequence[StoredCell], numbers: Sequence[int], eps: float) -> PerSample:
    """Returns what the cells of one subject say of each sample at one radius.

    An adversarial example breaks its sample at every radius that holds it, whichever cell found it; only the cells read
    at this radius must have answered.

    Args:
        cells: all cells of the subject.
        numbers: the number of each cell's attack.
        eps: a radius at which at least one of them is read.
    """
    own = {i: reading for i, cell in enumerate(cells) for reading in cell.readings if reading.eps == eps}
    anywhere = Reading(eps, next(iter(own.values())).allowed)
    sample = np.unique(np.concatenate([cell.sample for cell in cells]))
    attacks = tuple(sorted(set(numbers)))
    breaks = np.zeros((len(attacks), len(sample)), dtype=bool)
    answered = np.ones((len(attacks), len(sample)), dtype=bool)
    misclassified = np.zeros(len(sample), dtype=bool)
    for i, cell in enumerate(cells):
        place, row = np.searchsorted(sample, cell.sample), attacks.index(numbers[i])
        breaks[row, place] |= cell.broken(own.get(i, anywhere))
        misclassified[place] |= cell.status == "misclassified"
        if i in own:
            has_answer = np.zeros(len(sample), dtype=bool)
            has_answer[place] = np.isin(cell.status, ANSWERS)
            answered[row] &= has_answer
    robust_or_not = np.where(answered.all(axis=0), "robust", "unresolved")
    status = np.where(misclassified, "misclassified", np.where(breaks.any(axis=0), "broken", robust_or_not))
    return PerSample(sample, status, attacks, breaks & ~misclassified, answered)


def worst_case(cells: Sequence[StoredCell], numbers: Sequence[int], subject: int, eps: float) -> WorstCase:
    """Returns the worst case over the cells of one subject at one radius.

    Samples of which no cell has a row yet are unresolved.
    """
    found = per_sample(cells, numbers, eps)
    samples = max(*(cell.expected for cell in cells), len(found.sample))
    unseen = samples - len(found.sample)
    counts = {status: int((found.status == status).sum()) for status in ("misclassified", "broken", "robust")}
    unresolved = samples - sum(counts.values())
    return WorstCase(
        subject=subject,
        eps=eps,
        samples=samples,
        unresolved=unresolved,
        **counts,
        clean=wilson(len(found.sample) - counts["misclassified"], len(found.sample)),
        low=wilson(counts["robust"], samples),
        high=wilson(counts["robust"] + unresolved, samples),
        refused=unresolved > UNRESOLVED_LIMIT * samples,
        shares=_shares(found, unseen, _asked(cells, numbers, eps)),
    )


def _asked(cells: Sequence[StoredCell], numbers: Sequence[int], eps: float) -> set[int]:
    read = [any(reading.eps == eps for reading in cell.readings) for cell in cells]
    return {number for number, is_read in zip(numbers, read, strict=True) if is_read}


def _shares(found: PerSample, unseen: int, asked: set[int]) -> tuple[Share, ...]:
    once = found.breaks.sum(axis=0) == 1
    unresolved = found.status == "unresolved"
    return tuple(
        Share(
            attack=number,
            breaks=int(breaks.sum()),
            alone=int((breaks & once).sum()),
            unanswered=int((~answered & unresolved).sum()) + (unseen if number in asked else 0),
        )
        for number, breaks, answered in zip(found.attacks, found.breaks, found.answered, strict=True)
    )

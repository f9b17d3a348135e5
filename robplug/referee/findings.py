"""What the diagnostics say of a subject, and what they may look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from robplug.referee.binomial import SIGNIFICANT, mcnemar
from robplug.referee.entries import Attack, Subject
from robplug.referee.rundir import StoredCell
from robplug.referee.wilson import Rate, wilson

Array = np.ndarray[Any, Any]
NO_FLAG, SUSPICIOUS, INVALID = LEVELS = ("no flag", "suspicious", "invalid")
"""Verdicts, the worst last. None of them is "reliable": no check proves that."""
MANY = 0.01
"""Share of samples that the lower end of an interval must exceed: one odd sample is no pattern."""


class CannotCheckError(Exception):
    """A check has nothing to go by; the message says why."""


@dataclass(frozen=True)
class Finding:
    """One check that was raised.

    Attributes:
        level: suspicious or invalid.
        evidence: what was seen, in one sentence.
        numbers: the same for programs.
        eps: the radius at which it was seen, or None.
        attacks: numbers of the attacks in it.
        check: name of the check.
        source: where it was published.
        remedy: what to add to the plan, or to look at.
    """

    level: str
    evidence: str
    numbers: dict[str, float]
    eps: float | None = None
    attacks: tuple[int, ...] = ()
    check: str = ""
    source: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Unchecked:
    """A check that could not be made.

    Attributes:
        check: its name.
        reason: why.
    """

    check: str
    reason: str


@dataclass(frozen=True)
class StepPoint:
    """What a PGD of so many steps leaves.

    Attributes:
        steps: their number.
        robust: share of the probe's samples that it does not break.
        margin: median over the samples of the largest other logit minus the true one where the attack ended, and 0 for
            a broken sample.
    """

    steps: int
    robust: Rate
    margin: float | None


@dataclass(frozen=True)
class Diagnosis:
    """Whether the numbers of one subject can be believed.

    Attributes:
        subject: its number.
        verdict: the worst level of the findings, or "no flag".
        findings: what was raised.
        checked: names of the checks that were made.
        unchecked: those that could not be made.
        adaptive: numbers of the attacks that the plan names as adaptive to the target's defence and that have begun.
        steps: the probe's curve over numbers of steps; empty without.
    """

    subject: int
    verdict: str
    findings: tuple[Finding, ...]
    checked: tuple[str, ...]
    unchecked: tuple[Unchecked, ...]
    adaptive: tuple[int, ...]
    steps: tuple[StepPoint, ...]


@dataclass(frozen=True)
class Check:
    """A rule, with the paper that has it and the remedy that it names."""

    name: str
    source: str
    remedy: str
    rule: Callable[[Evidence], Iterable[Finding]]

    def __call__(self, evidence: Evidence) -> list[Finding]:
        """Returns the findings.

        Raises:
            CannotCheckError: there is nothing to go by.
        """
        found = self.rule(evidence)
        return [replace(finding, check=self.name, source=self.source, remedy=self.remedy) for finding in found]


def check(name: str, *, source: str, remedy: str) -> Callable[[Callable[[Evidence], Iterable[Finding]]], Check]:
    """Makes a `Check` of a rule."""
    return lambda rule: Check(name, source, remedy, rule)


@dataclass(frozen=True)
class Probe:
    """What was measured on some samples at the end of a run; see `robplug.referee.probes`.

    Attributes:
        samples: indices in the data set.
        y: their classes.
        eps: the radius, or None of a probe of the model alone.
        columns: measurements by name, an entry a sample.
        failed: why a measurement is missing, by its name.
    """

    samples: Array
    y: Array
    eps: float | None
    columns: dict[str, Array]
    failed: dict[str, str]

    def column(self, measure: str, name: str) -> Array:
        """Returns one column of a measurement.

        Raises:
            CannotCheckError: it could not be made.
        """
        if measure in self.failed:
            raise CannotCheckError(self.failed[measure])
        return self.columns[f"{measure}.{name}"]


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
        """Compares two attacks sample by sample."""
        both = first.answered & second.answered
        only = [int((one.broken & ~other.broken & both).sum()) for one, other in ((first, second), (second, first))]
        return cls(int(both.sum()), *only)

    @property
    def p(self) -> float:
        """Of the difference, by McNemar's test."""
        return mcnemar(self.only_first, self.only_second)

    @property
    def differ(self) -> bool:
        """Whether the two do not break alike, and not by chance."""
        return self.p < SIGNIFICANT

    @property
    def first_wins(self) -> bool:
        """Whether the first breaks more, and not by chance."""
        return self.only_first > self.only_second and self.differ

    @property
    def numbers(self) -> dict[str, float]:
        """For programs."""
        return {"samples": self.total, "only_first": self.only_first, "only_second": self.only_second, "p": self.p}

    def told(self, first: str, second: str) -> str:
        """For people."""
        counts = f"{self.only_first} samples fall to {first} alone, {self.only_second} to {second} alone"
        return f"{counts}, of {self.total} (McNemar p = {self.p:.2g})"


@dataclass(frozen=True)
class Evidence:
    """All that the checks may look at: rows and probes of one subject.

    Attributes:
        subject: what is diagnosed.
        cells: attacks made on the target, and their cells.
        foreign: likewise, made on another target and judged on this one.
        model: the probe of the model, or None.
        threat: the probe of the model under this threat, or None.
        no_probe: why there is none.
    """

    subject: Subject
    cells: tuple[tuple[Attack, StoredCell], ...]
    foreign: tuple[tuple[Attack, StoredCell], ...] = ()
    model: Probe | None = None
    threat: Probe | None = None
    no_probe: str = "no probe was run"

    @cached_property
    def radii(self) -> list[float]:
        """The plan's radii."""
        found = {reading.eps for _, cell in self.cells for reading in cell.readings}
        return sorted(eps for eps in found if eps is not None)

    @property
    def stochastic(self) -> bool:
        """Whether the target is declared to give other answers each time."""
        return any(cell.record["target_info"]["stochastic"] for _, cell in self.cells)

    def iterative(self) -> list[StoredCell]:
        """Returns the cells of gradient attacks of several steps.

        Raises:
            CannotCheckError: there is none.
        """
        found = [cell for attack, cell in self.cells if attack.needs == "gradients" and not is_one_step(cell)]
        if not found:
            raise CannotCheckError("the plan has no gradient attack of several steps")
        return found

    def probe_of_model(self) -> Probe:
        """Returns the probe of the model.

        Raises:
            CannotCheckError: there is none.
        """
        if self.model is None:
            raise CannotCheckError(self.no_probe)
        return self.model

    def probe_of_threat(self) -> Probe:
        """Returns the probe under the threat.

        Raises:
            CannotCheckError: there is none, or it is of another kind of threat.
        """
        if self.subject.targeted:
            raise CannotCheckError("probes are untargeted")
        if self.threat is None:
            raise CannotCheckError(self.no_probe)
        return self.threat

    def need_repeatable(self) -> None:
        """Makes sure that two calls of the model give one answer.

        Raises:
            CannotCheckError: they do not, and what follows would measure chance.
        """
        if self.stochastic:
            raise CannotCheckError("the target is stochastic")
        if (
            self.model is not None
            and "repeat.differs" in self.model.columns
            and self.model.column("repeat", "differs").any()
        ):
            raise CannotCheckError("two identical calls of the model differ")


def is_one_step(cell: StoredCell) -> bool:
    """Whether an attack sent each sample that it was given backward exactly once."""
    attacked = int(np.isin(cell.status, ("robust", "broken", "invalid", "error")).sum())
    backwards = sum(int(chunk["backwards"]) for chunk in cell.record["chunks"])
    return 0 < backwards == attacked * int(cell.record["target_info"]["eot"])


def share(hits: Array) -> Rate:
    """Returns the share of true entries."""
    return wilson(int(hits.sum()), len(hits))


def by_attack(cells: Iterable[tuple[Attack, StoredCell]]) -> Iterator[tuple[Attack, list[StoredCell]]]:
    """Yields each attack with its cells."""
    groups: dict[int, tuple[Attack, list[StoredCell]]] = {}
    for attack, cell in cells:
        groups.setdefault(attack.number, (attack, []))[1].append(cell)
    yield from groups.values()

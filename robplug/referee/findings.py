"""What the diagnostics say of a subject, and what they may look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from robplug.referee.entries import Attack, Subject
from robplug.referee.paired import Array
from robplug.referee.rundir import StoredCell
from robplug.referee.wilson import Rate, wilson

NO_FLAG, SUSPICIOUS, INVALID = LEVELS = ("no flag", "suspicious", "invalid")
"""Verdicts, the worst last. None of them is "reliable": no check proves that."""
NOT_CHECKED = "not checked"
"""The verdict where no check could be made."""
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
    numbers: Mapping[str, float]
    eps: float | None = None
    attacks: tuple[int, ...] = ()
    check: str = ""
    source: str = ""
    remedy: str = ""


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
        verdict: the worst level of the findings, "no flag" without, or "not checked" if no check could be made.
        findings: what was raised.
        checked: names of the checks that were made.
        unchecked: those that could not be made, and why.
        adaptive: numbers of the attacks that the plan names as adaptive to the target's defence and that have begun.
        steps: the probe's curve over numbers of steps; empty without.
    """

    subject: int
    verdict: str
    findings: tuple[Finding, ...]
    checked: tuple[str, ...]
    unchecked: dict[str, str]
    adaptive: tuple[int, ...]
    steps: tuple[StepPoint, ...]

    @property
    def raised(self) -> dict[str, list[Finding]]:
        """The findings of each check that was raised."""
        names = dict.fromkeys(finding.check for finding in self.findings)
        return {name: [finding for finding in self.findings if finding.check == name] for name in names}


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
        missing: why there is none, if there is none.
        samples: indices in the data set.
        y: their classes.
        eps: the radius, or None of a probe of the model alone.
        columns: measurements by name, an entry a sample.
        failed: why a measurement could not be made, by its name.
    """

    missing: str
    samples: Array = field(default_factory=lambda: np.zeros(0, dtype=int))
    y: Array = field(default_factory=lambda: np.zeros(0, dtype=int))
    eps: float | None = None
    columns: dict[str, Array] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def column(self, measure: str, name: str) -> Array:
        """Returns one column of a measurement.

        Raises:
            CannotCheckError: it is not there.
        """
        if not self.has(measure):
            raise CannotCheckError(self.failed.get(measure, self.missing))
        return self.columns[f"{measure}.{name}"]

    def share(self, measure: str, name: str) -> Rate:
        """Returns the share of samples for which a column is true."""
        return share(self.column(measure, name) > 0)

    def has(self, measure: str) -> bool:
        """Whether a measurement was made."""
        return any(name.startswith(f"{measure}.") for name in self.columns)


def share(hits: Array) -> Rate:
    """Returns the share of true entries."""
    return wilson(int(hits.sum()), len(hits))


@dataclass(frozen=True)
class Evidence:
    """All that the checks may look at: rows and probes of one subject.

    Attributes:
        subject: what is diagnosed.
        cells: attacks made on the target, and their cells.
        foreign: likewise, made on another target and judged on this one.
        model: the probe of the model.
        threat: the probe of the model under this threat.
    """

    subject: Subject
    cells: tuple[tuple[Attack, StoredCell], ...]
    foreign: tuple[tuple[Attack, StoredCell], ...]
    model: Probe
    threat: Probe

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

    def need_repeatable(self) -> None:
        """Makes sure that two calls of the model give one answer, as far as that is known.

        Raises:
            CannotCheckError: they do not, and what follows would measure chance.
        """
        if self.stochastic:
            raise CannotCheckError("the target is stochastic")
        if self.model.has("repeat") and self.model.share("repeat", "differs").count:
            raise CannotCheckError("two identical calls of the model differ")


def is_one_step(cell: StoredCell) -> bool:
    """Whether an attack sent each sample that it was given backward exactly once."""
    attacked = int(np.isin(cell.status, ("robust", "broken", "invalid", "error")).sum())
    backwards = sum(int(chunk["backwards"]) for chunk in cell.record["chunks"])
    return 0 < backwards == attacked * int(cell.record["target_info"]["eot"])


def is_noise(cell: StoredCell) -> bool:
    """Whether an attack draws points and does not search."""
    return "noise" in str(cell.record["attack"])

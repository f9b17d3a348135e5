"""From the rows of a run to its numbers; see docs/results-format.md for their definitions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from robplug.referee.diagnostics import diagnose
from robplug.referee.entries import Attack, Subject, list_attacks, list_subjects
from robplug.referee.findings import Diagnosis
from robplug.referee.peers import with_peers
from robplug.referee.quality import Quality, quality
from robplug.referee.rundir import Reading, Run, StoredCell, load_run
from robplug.referee.transfer import Entry, Matrix, matrices
from robplug.referee.wilson import Rate, wilson
from robplug.referee.worst import WorstCase, worst_case

__all__ = [
    "Attack",
    "CellSummary",
    "Claim",
    "Cost",
    "Entry",
    "Matrix",
    "Subject",
    "Summary",
    "load_run",
    "summarise",
]


@dataclass(frozen=True)
class Claim:
    """What the library says, beside the verdict.

    Attributes:
        kind: "claim", or "prediction alone" where the library makes none: the share whose class changed as wanted,
            be the adversarial example valid or not.
        rate: of success, over the samples classified correctly before.
    """

    kind: str
    rate: Rate


@dataclass(frozen=True)
class Cost:
    """What a cell took, all its radii together.

    Attributes:
        forwards: rows sent forward.
        backwards: rows sent backward.
        seconds: inside the attack.
    """

    forwards: int
    backwards: int
    seconds: float


@dataclass(frozen=True)
class CellSummary:
    """One cell read at one radius: a row of the tables.

    Attributes:
        key: of the cell.
        subject: number of the subject.
        attack: number of the attack.
        eps: the radius, or None where any distance counts.
        expected: samples that the finished cell has.
        samples: samples that it has now.
        misclassified: wrong before the attack.
        robust: attacked and not broken within the radius, or with nothing to attack.
        broken: broken within the radius.
        invalid: answered with something that breaks the rules of the threat.
        error: not answered.
        beyond: adversarial examples of a minimal attack outside the radius; counted as robust.
        silent: samples for which a valid adversarial example was seen and not returned.
        false_claims: samples whose success is claimed without a valid adversarial example at any distance.
        against_peers: samples on which this harmonised attack's verdict differs from most of its peers'.
        clean: accuracy before the attack.
        robust_accuracy: robust / samples; None where any distance counts.
        success: broken / (samples classified correctly).
        claim: the library's own view of that success.
        median_distance: over the broken samples, None if there is none.
        median_measures: likewise of what the norm measures beside the distance, by name.
        quality: of a task with many answers a sample, figures over all samples before and after, by name.
        cost: of the cell.
        notes: what the referee noted, with the number of times, most frequent first.
    """

    key: str
    subject: int
    attack: int
    eps: float | None
    expected: int
    samples: int
    misclassified: int
    robust: int
    broken: int
    invalid: int
    error: int
    beyond: int
    silent: int
    false_claims: int
    against_peers: int
    clean: Rate
    robust_accuracy: Rate | None
    success: Rate
    claim: Claim
    median_distance: float | None
    median_measures: dict[str, float | None]
    quality: Quality
    cost: Cost
    notes: tuple[tuple[str, int], ...]

    @property
    def finished(self) -> bool:
        """Whether every sample has its row."""
        return self.samples >= self.expected


@dataclass(frozen=True)
class Summary:
    """All numbers of a run.

    Attributes:
        finished: whether every cell has all its rows.
        not_begun: cells of the plan of which there is nothing yet.
        left_aside: cells in the directory that are not of the present plan.
        subjects: by number.
        attacks: by number, which starts at 1.
        cells: one entry a cell and radius.
        worst_cases: one entry a subject and radius.
        incomplete: cells that have begun and lack rows.
        matrices: one a transfer, threat and radius.
        diagnoses: one a subject.
    """

    finished: bool
    not_begun: int
    left_aside: int
    subjects: tuple[Subject, ...]
    attacks: tuple[Attack, ...]
    cells: tuple[CellSummary, ...]
    worst_cases: tuple[WorstCase, ...]
    incomplete: int
    matrices: tuple[Matrix, ...]
    diagnoses: tuple[Diagnosis, ...]

    @property
    def dense(self) -> bool:
        """Whether any task of the run has many answers a sample."""
        return any(cell.quality for cell in self.cells)

    def attack(self, number: int) -> Attack:
        """Returns the attack of a number."""
        return self.attacks[number - 1]


def summarise(run: Run) -> Summary:
    """Computes the numbers of a run."""
    attacks, numbers = list_attacks(run.cells)
    attack_of = [number for cell, number in zip(run.cells, numbers, strict=True) if not cell.transferred]
    subjects, subject_of = list_subjects(run.own)
    cells = [
        _cell(cell, reading, subject_of[i], attack_of[i]) for i, cell in enumerate(run.own) for reading in cell.readings
    ]
    return Summary(
        finished=run.finished,
        not_begun=run.not_begun,
        left_aside=run.left_aside,
        subjects=subjects,
        attacks=attacks,
        cells=with_peers(cells, run.own),
        worst_cases=tuple(_worst_cases(run.own, subject_of, attack_of, len(subjects))),
        incomplete=sum(not cell.finished for cell in run.cells),
        matrices=matrices(run, numbers),
        diagnoses=diagnose(run, subjects, subject_of, attacks, numbers),
    )


def cells_of(run: Run, summary: Summary, subject: int) -> tuple[list[StoredCell], list[int]]:
    """Returns the cells of a subject and the numbers of their attacks."""
    attack_of = {cell.key: cell.attack for cell in summary.cells if cell.subject == subject}
    cells = [cell for cell in run.own if cell.record["key"] in attack_of]
    return cells, [attack_of[cell.record["key"]] for cell in cells]


def _cell(cell: StoredCell, reading: Reading, subject: int, attack: int) -> CellSummary:
    broken, samples = cell.broken(reading), len(cell.sample)
    counts = Counter(cell.status.tolist())
    within = int(broken.sum())
    beyond = counts["broken"] - within
    right = samples - counts["misclassified"]
    attacked = right - counts["unattacked"]
    robust = counts["robust"] + beyond + counts["unattacked"]
    return CellSummary(
        key=cell.record["key"],
        subject=subject,
        attack=attack,
        eps=reading.eps,
        expected=cell.expected,
        samples=samples,
        misclassified=counts["misclassified"],
        robust=robust,
        broken=within,
        invalid=counts["invalid"],
        error=counts["error"],
        beyond=beyond,
        silent=int(cell.column("silent").sum()),
        false_claims=int(((cell.claim == 1) & ~np.isin(cell.status, ("broken", "misclassified"))).sum()),
        against_peers=0,
        clean=wilson(right, samples),
        robust_accuracy=None if reading.eps is None else wilson(robust, samples),
        success=wilson(within, attacked),
        claim=_claim(cell, attacked),
        median_distance=float(np.median(cell.distance[broken])) if within else None,
        median_measures=_medians(cell.measures, broken),
        quality=quality(cell, reading),
        cost=_cost(cell),
        notes=_notes(cell),
    )


def _medians(measures: list[dict[str, float]], broken: np.ndarray[Any, Any]) -> dict[str, float | None]:
    medians: dict[str, float | None] = {}
    for name in dict.fromkeys(name for row in measures for name in row):
        values = np.array([row.get(name) for row in measures], dtype=float)  # None becomes nan
        values = values[broken & np.isfinite(values)]
        medians[name] = float(np.median(values)) if len(values) else None
    return medians


def _claim(cell: StoredCell, attacked: int) -> Claim:
    was_attacked = ~np.isin(cell.status, ("misclassified", "unattacked"))
    if (cell.claim[was_attacked] >= 0).any():
        return Claim("claim", wilson(int((cell.claim[was_attacked] == 1).sum()), attacked))
    after = cell.column("prediction_adv")
    reached = after == cell.column("y_goal") if cell.targeted else after != cell.column("y")
    return Claim("prediction alone", wilson(int((reached & (after >= 0) & was_attacked).sum()), attacked))


def _cost(cell: StoredCell) -> Cost:
    chunks = cell.record["chunks"]
    return Cost(
        forwards=sum(int(chunk["forwards"]) for chunk in chunks),
        backwards=sum(int(chunk["backwards"]) for chunk in chunks),
        seconds=sum(float(chunk["seconds"]) for chunk in chunks),
    )


def _notes(cell: StoredCell) -> tuple[tuple[str, int], ...]:
    notes = Counter(note for chunk in cell.record["chunks"] for note in chunk["notes"])
    notes.update(note for note in cell.table["note"].to_pylist() if note)
    return tuple(notes.most_common())


def _worst_cases(
    cells: Sequence[StoredCell], subject_of: list[int], attack_of: list[int], subjects: int
) -> list[WorstCase]:
    found = []
    for subject in range(subjects):
        mine = [i for i, of in enumerate(subject_of) if of == subject]
        own, numbers = [cells[i] for i in mine], [attack_of[i] for i in mine]
        radii = {reading.eps for cell in own for reading in cell.readings if reading.eps is not None}
        found += [worst_case(own, numbers, subject, eps) for eps in sorted(radii)]
    return found

"""Can the numbers of a run be believed? A verdict for each subject, from its rows and the probes of its model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from robplug.referee import rules_probes, rules_rows
from robplug.referee.cells import names_of
from robplug.referee.entries import Attack, Subject, subject_identity
from robplug.referee.findings import LEVELS, CannotCheckError, Check, Diagnosis, Evidence, Finding, Probe, Unchecked
from robplug.referee.rundir import Run, StoredCell

CHECKS: tuple[Check, ...] = (
    rules_probes.repeatable,
    rules_probes.answers,
    rules_probes.gradients,
    rules_probes.saturation,
    rules_probes.differences,
    rules_probes.unbounded,
    rules_rows.black_box,
    rules_rows.one_step,
    rules_rows.budget,
    rules_probes.noise,
    rules_probes.convergence,
    rules_rows.repeats,
    rules_rows.silent,
)
"""All checks, those first that explain others."""


def diagnose(
    run: Run, subjects: Sequence[Subject], subject_of: Sequence[int], attacks: Sequence[Attack], numbers: Sequence[int]
) -> tuple[Diagnosis, ...]:
    """Returns a diagnosis for each subject of a run, finished or not.

    Args:
        run: the run.
        subjects: its subjects, by number.
        subject_of: the subject of each of ``run.own``.
        attacks: its attacks, by number from 1.
        numbers: the attack of each of ``run.cells``.
    """
    place = {subject_identity(cell): number for cell, number in zip(run.own, subject_of, strict=True)}
    own: dict[int, list[tuple[Attack, StoredCell]]] = {subject.number: [] for subject in subjects}
    foreign: dict[int, list[tuple[Attack, StoredCell]]] = {subject.number: [] for subject in subjects}
    for cell, number in zip(run.cells, numbers, strict=True):
        subject = place.get(subject_identity(cell))  # a victim need not be attacked itself
        if subject is not None:
            (foreign if cell.transferred else own)[subject].append((attacks[number - 1], cell))
    return tuple(_diagnose(run, subject, own[subject.number], foreign[subject.number]) for subject in subjects)


def _diagnose(
    run: Run,
    subject: Subject,
    cells: list[tuple[Attack, StoredCell]],
    foreign: list[tuple[Attack, StoredCell]],
) -> Diagnosis:
    record = cells[0][1].record
    model, threat = _probe(run, record, None), _probe(run, record, subject.norm)
    off = run.record["plan"].get("probes") == 0
    no_probe = "the plan has probes = 0" if off else "no probe of it was run"
    evidence = Evidence(subject, tuple(cells), tuple(foreign), model, threat, no_probe)
    findings: list[Finding] = []
    checked, unchecked = [], []
    for check in CHECKS:
        try:
            if record.get("task", "classification") != "classification":
                raise CannotCheckError(f"no check is made of {record['task']}")
            findings += check(evidence)
            checked.append(check.name)
        except CannotCheckError as error:
            unchecked.append(Unchecked(check.name, str(error)))
    worst = max((LEVELS.index(finding.level) for finding in findings), default=0)
    return Diagnosis(
        subject=subject.number,
        verdict=LEVELS[worst],
        findings=tuple(findings),
        checked=tuple(checked),
        unchecked=tuple(unchecked),
        adaptive=_adaptive(run, record, cells),
        steps=() if subject.targeted else rules_probes.curve(threat),
    )


def _probe(run: Run, record: dict[str, Any], norm: str | None) -> Probe | None:
    """Returns the probe of a target and its data, of the model alone without a norm."""
    asked = [record["target"], record["digests"]["data"], norm]
    for probe in run.probes:
        if [probe["target"], probe["data"], probe["norm"]] == asked:
            columns = {name: np.array(values, dtype=float) for name, values in probe["columns"].items()}
            samples, y = (np.array(probe[name], dtype=int) for name in ("samples", "y"))
            return Probe(samples, y, probe["eps"], columns, probe["failed"])
    return None


def _adaptive(run: Run, record: dict[str, Any], cells: list[tuple[Attack, StoredCell]]) -> tuple[int, ...]:
    """Returns the attacks that the plan names as adaptive to the target."""
    entries = run.record["plan"].get("targets", ())
    named = {name for entry in entries if entry["name"] == record["target"] for name in entry.get("adaptive", ())}
    found = [
        attack.number for attack, cell in cells if named & set(names_of(cell.record["attack"], cell.record["label"]))
    ]
    return tuple(dict.fromkeys(found))

"""Can the numbers of a run be believed? A verdict for each subject, from its rows and the probes of its model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from robplug.referee import rules_probes, rules_rows
from robplug.referee.cells import names_of
from robplug.referee.entries import Attack, Subject, subject_identity
from robplug.referee.findings import (
    LEVELS,
    NO_FLAG,
    NOT_CHECKED,
    CannotCheckError,
    Check,
    Diagnosis,
    Evidence,
    Finding,
    Probe,
)
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
    rules_probes.averaging,
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
    found = []
    for subject in subjects:
        # a victim of transfers need not be attacked itself
        mine = [place.get(subject_identity(cell)) == subject.number for cell in run.cells]
        cells = [(attacks[n - 1], cell) for cell, n, own in zip(run.cells, numbers, mine, strict=True) if own]
        found.append(_diagnose(run, subject, cells))
    return tuple(found)


def _diagnose(run: Run, subject: Subject, cells: list[tuple[Attack, StoredCell]]) -> Diagnosis:
    own = tuple((attack, cell) for attack, cell in cells if not cell.transferred)
    foreign = tuple((attack, cell) for attack, cell in cells if cell.transferred)
    record = own[0][1].record
    threat = Probe("probes are untargeted") if subject.targeted else _probe(run, record, subject.norm)
    evidence = Evidence(subject, own, foreign, _probe(run, record, None), threat)
    findings: list[Finding] = []
    unchecked: dict[str, str] = {}
    for check in CHECKS:
        try:
            if record.get("task", "classification") != "classification":
                raise CannotCheckError(f"there is no check of {record['task']}")
            findings += check(evidence)
        except CannotCheckError as error:
            unchecked[check.name] = str(error)
    if not findings and not any(np.isin(cell.status, ("robust", "broken")).any() for _, cell in own):
        # nothing is there to be believed
        unchecked = {check.name: unchecked.get(check.name, "no attack gave a valid answer") for check in CHECKS}
    checked = tuple(check.name for check in CHECKS if check.name not in unchecked)
    best = NO_FLAG if checked else NOT_CHECKED
    return Diagnosis(
        subject=subject.number,
        verdict=max((finding.level for finding in findings), key=LEVELS.index, default=best),
        findings=tuple(findings),
        checked=checked,
        unchecked=unchecked,
        adaptive=_adaptive(run, record, own),
        steps=rules_probes.curve(threat),
    )


def _probe(run: Run, record: dict[str, Any], norm: str | None) -> Probe:
    """Returns the probe of a target and its data, of the model alone without a norm."""
    asked = [record["target"], record["digests"]["data"], norm]
    for probe in run.probes:
        if [probe["target"], probe["data"], probe["norm"]] == asked:
            columns = {name: np.array(values, dtype=float) for name, values in probe["columns"].items()}
            samples, y = (np.array(probe[name], dtype=int) for name in ("samples", "y"))
            return Probe("it was not measured", samples, y, probe["eps"], columns, probe["failed"])
    return Probe("the plan has probes = 0" if run.record["plan"].get("probes") == 0 else "the model was not probed")


def _adaptive(run: Run, record: dict[str, Any], cells: Sequence[tuple[Attack, StoredCell]]) -> tuple[int, ...]:
    """Returns the attacks that the plan names as adaptive to the target."""
    entries = run.record["plan"].get("targets", ())
    named = {name for entry in entries if entry["name"] == record["target"] for name in entry.get("adaptive", ())}
    found = [
        attack.number for attack, cell in cells if named & set(names_of(cell.record["attack"], cell.record["label"]))
    ]
    return tuple(dict.fromkeys(found))

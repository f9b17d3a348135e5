"""The report of a run: one HTML file that needs nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robplug.errors import InputError, RobplugError
from robplug.referee import formats
from robplug.referee.findings import Diagnosis
from robplug.referee.rundir import Run, load_run
from robplug.referee.store import write_atomically
from robplug.referee.summary import Attack, CellSummary, Subject, Summary, summarise
from robplug.referee.worst import UNRESOLVED_LIMIT, WorstCase

if TYPE_CHECKING:
    from jinja2 import Environment

EXAMPLES = 12
"""Examples shown for a subject, one an attack at most."""
CELLS_OF_A_NOTE = 6
"""Cells named beside a note."""


def write_report(run: str | Path | Run, path: str | Path | None = None) -> Path:
    """Writes the report of a run, finished or not.

    Args:
        run: the run directory, or the run that was read from it.
        path: of the report; ``report.html`` in the run directory without.

    Returns:
        The path of the report.

    Raises:
        StoreError: the run cannot be read, or the report cannot be written.
        RobplugError: the extra ``report`` is not installed.
    """
    environment = _environment()
    run = run if isinstance(run, Run) else load_run(run)
    place = run.path / "report.html" if path is None else Path(path)
    if place.is_dir():
        raise InputError("the path of a file for the report", f"the directory {place}", f"try {place / 'report.html'}")
    html = environment.get_template("report.html").render(_content(run, summarise(run)))
    write_atomically(place, lambda temporary: temporary.write_text(html, encoding="utf-8"))
    return place


def _environment() -> Environment:
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise RobplugError(f"the report needs the package {error.name}: pip install 'robplug[report]'") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["f"] = formats
    return environment


@dataclass(frozen=True)
class Panel:
    """What is shown of one subject beside the tables.

    Attributes:
        subject: the subject.
        curve: an ``<svg>``.
        distances: an ``<svg>``, or "".
        measures: names of what the norm measures beside the distance.
        cells: rows of the summary, by radius and attack.
        attacks: those in the figures.
        examples: (attack, example) pairs.
        left_out: number of attacks with examples that are not shown.
        costs: a row an attack.
        diagnosis: whether the numbers can be believed.
        steps: an ``<svg>`` of what more steps gain, or "".
    """

    subject: Subject
    curve: Any
    distances: Any
    measures: list[str]
    cells: list[CellSummary]
    attacks: list[Attack]
    examples: list[tuple[Attack, Any]]
    left_out: int
    costs: list[CostRow]
    diagnosis: Diagnosis
    steps: Any


@dataclass(frozen=True)
class CostRow:
    """What an attack took on one subject, all radii together."""

    attack: Attack
    samples: int
    forwards: int
    backwards: int
    seconds: float


@dataclass(frozen=True)
class Params:
    """An attack's parameters: (name, as passed or None, in force), several values where cells differ."""

    attack: Attack
    names: list[str]
    params: list[tuple[str, str | None, str]]


@dataclass
class Note:
    """What the referee noted: a text, or the first of several that differ in numbers alone."""

    text: str
    times: int = 0
    texts: set[str] = field(default_factory=set)
    cells: list[str] = field(default_factory=list)


def _content(run: Run, summary: Summary) -> dict[str, Any]:
    return {
        "run": run,
        "record": run.record,
        "summary": summary,
        "limit": UNRESOLVED_LIMIT,
        "threats": _by_threat(summary),
        "tables": _tables(summary),
        "panels": [_panel(run, summary, subject) for subject in summary.subjects],
        "sweeps": _sweeps(summary),
        "traces": _traces(run, summary),
        "params": [_params(run, summary, attack) for attack in summary.attacks],
        "models": _models(run, summary),
        "noted": _noted(summary),
        "shown": CELLS_OF_A_NOTE,
        "plan": json.dumps(run.record["plan"], indent=1, ensure_ascii=False),
        "seconds": sum({cell.key: cell.cost.seconds for cell in summary.cells}.values()),
    }


def _by_threat(summary: Summary) -> list[tuple[Subject, list[WorstCase]]]:
    """Groups the worst cases so that targets under one threat stand together; a subject speaks for its group."""
    groups: dict[tuple[Any, ...], tuple[Subject, list[WorstCase]]] = {}
    for case in summary.worst_cases:
        subject = summary.subjects[case.subject]
        threat = (subject.dataset, subject.norm, subject.targeted, subject.goal_rule)
        groups.setdefault(threat, (subject, []))[1].append(case)
    return [(subject, sorted(cases, key=lambda case: (case.eps, case.subject))) for subject, cases in groups.values()]


def _tables(summary: Summary) -> list[tuple[Subject, float | None, WorstCase | None, list[CellSummary]]]:
    """A table a subject and radius."""
    cases = {(case.subject, case.eps): case for case in summary.worst_cases}
    found = []
    for subject in summary.subjects:
        mine = [cell for cell in summary.cells if cell.subject == subject.number]
        radii = sorted({cell.eps for cell in mine}, key=lambda eps: (eps is None, eps or 0.0))
        for eps in radii:
            rows = sorted((cell for cell in mine if cell.eps == eps), key=lambda cell: cell.attack)
            case = None if eps is None else cases[subject.number, eps]
            found.append((subject, eps, case, rows))
    return found


def _panel(run: Run, summary: Summary, subject: Subject) -> Panel:
    from markupsafe import Markup

    from robplug.referee import figures, step_curve

    diagnosis = summary.diagnoses[subject.number]
    cells = [cell for cell in summary.cells if cell.subject == subject.number]
    cases = [case for case in summary.worst_cases if case.subject == subject.number]
    stored = {cell.record["key"]: cell for cell in run.cells}
    examples = _examples(cells, stored, summary)
    return Panel(
        subject=subject,
        # matplotlib has escaped the names in its text elements
        curve=Markup(figures.curve(cases, cells, stored, summary)),  # noqa: S704
        distances=Markup(figures.distances(cells, stored, summary)),  # noqa: S704
        measures=list(dict.fromkeys(name for cell in cells for name in cell.median_measures)),
        cells=sorted(cells, key=lambda cell: (cell.eps is None, cell.eps or 0.0, cell.attack)),
        attacks=[summary.attack(number) for number in sorted({cell.attack for cell in cells})],
        examples=examples[:EXAMPLES],
        left_out=max(len(examples) - EXAMPLES, 0),
        costs=_costs(cells, summary),
        diagnosis=diagnosis,
        steps=Markup(step_curve.draw(diagnosis.steps)) if diagnosis.steps else "",  # noqa: S704
    )


def _sweeps(summary: Summary) -> list[tuple[str, Any]]:
    """Returns title and ``<svg>`` of each curve of the transfers."""
    from markupsafe import Markup

    from robplug.referee.sweeps import draw, sweeps

    # matplotlib has escaped the names in its text elements
    return [(sweep.title, Markup(draw(sweep))) for sweep in sweeps(summary)]  # noqa: S704


def _traces(run: Run, summary: Summary) -> list[tuple[str, Any]]:
    """Returns title and ``<svg>`` of what each attack followed on each subject."""
    from markupsafe import Markup

    from robplug.referee.traces import draw, read_trace

    stored = {cell.record["key"]: cell for cell in run.own}
    found = {}
    for cell in summary.cells:
        trace = read_trace(stored[cell.key])
        if trace is not None and cell.key not in found:
            subject = summary.subjects[cell.subject]
            title = f"{summary.attack(cell.attack).name}, {subject.target} on {subject.dataset}; {trace.ended}"
            found[cell.key] = (title, Markup(draw(trace)))  # noqa: S704 (numbers alone)
    return list(found.values())


def _examples(cells: Sequence[CellSummary], stored: dict[str, Any], summary: Summary) -> list[tuple[Attack, Any]]:
    """Returns an example an attack, of its largest radius."""
    from robplug.referee.pictures import first_example

    found = []
    for number in sorted({cell.attack for cell in cells}):
        own = sorted((cell for cell in cells if cell.attack == number), key=lambda cell: -(cell.eps or 0.0))
        example = first_example([stored[cell.key] for cell in own])
        if example is not None:
            found.append((summary.attack(number), example))
    return found


def _costs(cells: Sequence[CellSummary], summary: Summary) -> list[CostRow]:
    rows = []
    for number in sorted({cell.attack for cell in cells}):
        own = list({cell.key: cell for cell in cells if cell.attack == number}.values())
        rows.append(
            CostRow(
                summary.attack(number),
                samples=sum(cell.samples - cell.misclassified for cell in own),
                forwards=sum(cell.cost.forwards for cell in own),
                backwards=sum(cell.cost.backwards for cell in own),
                seconds=sum(cell.cost.seconds for cell in own),
            )
        )
    return rows


def _params(run: Run, summary: Summary, attack: Attack) -> Params:
    """Joins the parameters of the attack's cells, which differ where they follow from the radius or the norm."""
    keys = {cell.key for cell in summary.cells if cell.attack == attack.number}
    records = [cell.record for cell in run.cells if cell.record["key"] in keys]
    passed = records[0]["params_passed"]
    in_force: dict[str, list[str]] = {name: [] for record in records for name in record["params_in_force"]}
    for record in records:
        for name, value in record["params_in_force"].items():
            text = json.dumps(value, ensure_ascii=False)
            if text not in in_force[name]:
                in_force[name].append(text)
    shown = {name: json.dumps(value, ensure_ascii=False) for name, value in passed.items()}
    names = [*in_force, *(name for name in shown if name not in in_force)]
    params = [(name, shown.get(name), ", ".join(in_force.get(name, ()))) for name in names]
    return Params(attack, list(dict.fromkeys(record["attack"] for record in records)), params)


def _models(run: Run, summary: Summary) -> list[tuple[Subject, dict[str, Any]]]:
    """Returns, for each pair of model and data, a subject that has it and a record with its digests."""
    record_of = {cell.record["key"]: cell.record for cell in run.cells}
    found: dict[tuple[str, str], tuple[Subject, dict[str, Any]]] = {}
    for cell in summary.cells:
        subject = summary.subjects[cell.subject]
        found.setdefault((subject.target, subject.dataset), (subject, record_of[cell.key]))
    return list(found.values())


def _noted(summary: Summary) -> list[Note]:
    """Collects the notes of all cells; those that differ in numbers alone are one."""
    notes: dict[str, Note] = {}
    for cell in {cell.key: cell for cell in summary.cells}.values():
        subject, attack = summary.subjects[cell.subject], summary.attack(cell.attack)
        eps = f" \u03b5 = {formats.radius(cell.eps)}" if attack.budget == "fixed" else ""
        place = f"{attack.name}, {subject.target}, {formats.threat(subject)}{eps}"
        for text, times in cell.notes:
            note = notes.setdefault(re.sub(r"\d[\d.e+-]*", "0", text), Note(text))
            note.times += times
            note.texts.add(text)
            if place not in note.cells:
                note.cells.append(place)
    return sorted(notes.values(), key=lambda note: -note.times)

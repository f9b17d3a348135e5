"""The table of a run in the terminal."""

from __future__ import annotations

import io
import shutil
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from robplug.referee import formats
from robplug.referee.entries import Subject
from robplug.referee.summary import CellSummary, Entry, Matrix, Summary
from robplug.referee.worst import UNRESOLVED_LIMIT, WorstCase

ALWAYS = ("eps", "robust", "95 % interval", "success", "claimed", "invalid/ error")
WHERE_THERE_IS_ROOM = ("median distance", "forwards", "backwards", "time")
ITSELF = "source itself"
ROOM = 116
"""Columns of a terminal from which on all columns of the table fit without a break in a name."""


@dataclass(frozen=True)
class ResultsTable:
    """A table per subject, with the worst case below; for ``print`` and for rich's ``Console.print``."""

    summary: Summary

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=shutil.get_terminal_size((132, 24)).columns)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip("\n")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = ALWAYS if options.max_width < ROOM else (*ALWAYS, *WHERE_THERE_IS_ROOM)
        parts: list[Table | Text] = [] if self.summary.finished else [_unfinished(self.summary)]
        for subject in self.summary.subjects:
            parts.append(_table(self.summary, subject, columns))
            cases = [case for case in self.summary.worst_cases if case.subject == subject.number]
            parts += [_headline(self.summary, case) for case in cases]
            parts.append(_diagnosis(self.summary, subject))
        for matrix in self.summary.matrices:
            parts += [_matrix_table(self.summary, matrix), Text(_legend(matrix), style="dim")]
        if any(cell.beyond for cell in self.summary.cells):
            text = "\u2020 also beyond the radius: the attack looks for the smallest distance, wherever it is"
            parts.append(Text(text, style="dim"))
        if any(cell.claim.kind != "claim" for cell in self.summary.cells):
            parts.append(Text("* the attack makes no claim; this is what the prediction alone would say", style="dim"))
        yield Group(*parts)


def _unfinished(summary: Summary) -> Text:
    return Text(formats.unfinished(summary), style="bold")


def _table(summary: Summary, subject: Subject, columns: tuple[str, ...]) -> Table:
    """The table of one subject; names enter as `Text`, so that nothing in them is taken for markup."""
    title = f"{subject.target} on {subject.dataset}, {formats.threat(subject)}"
    table = Table(title=Text(title), title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("attack", overflow="fold", min_width=13)
    cells = _in_order(summary, subject)
    figures = list(dict.fromkeys(name for cell in cells for name in list(cell.quality)[:1]))
    left_out = ("95 % interval",) if figures and columns == ALWAYS else ()  # its place is the figures'
    columns = tuple(name for name in columns if name not in left_out)
    for name in (*figures, *columns):
        table.add_column(name, justify="right", no_wrap=name not in ("invalid/ error", "median distance"))
    for cell in cells:
        name, *rest = _cells(summary, cell)
        every = dict(zip((*ALWAYS, *WHERE_THERE_IS_ROOM), rest, strict=True))
        values = [every[column] for column in columns]
        shown = [
            formats.change(*cell.quality[figure]) if figure in cell.quality else formats.NONE for figure in figures
        ]
        table.add_row(*(Text(value) for value in (name, *shown, *values)))
    return table


def _matrix_table(summary: Summary, matrix: Matrix) -> Table:
    """The table of a transfer: a row a source and attack, a column a victim, shares of broken samples."""
    title = f"success on {formats.matrix(matrix, summary)}"
    table = Table(title=Text(title), title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("source", overflow="fold")
    table.add_column("attack", overflow="fold", min_width=13)
    itself = [ITSELF] if matrix.itself else []
    for victim in (*itself, *matrix.victims):
        table.add_column(Text(victim), justify="right", overflow="fold")
    for source in matrix.sources:
        for place, attack in enumerate(matrix.attacks_on(source)):
            shares = [_share(matrix.entry(source, attack, victim)) for victim in matrix.victims]
            if itself:
                shares.insert(0, _share(matrix.entry(source, attack, source)) if source in matrix.itself else "")
            row = [source if place == 0 else "", summary.attack(attack).name, *shares]
            table.add_row(*(Text(value) for value in row))
    return table


def _share(entry: Entry | None) -> str:
    if entry is None:
        return formats.NONE
    mark = " \u25a1" if entry.white_box else ""
    unresolved = f" ?{entry.unresolved}" if entry.unresolved else ""
    figure = f", {formats.first_figure(entry.quality)}" if entry.quality else ""
    return f"{formats.percent(entry.success.value)}{mark}{unresolved}{figure}"


def _legend(matrix: Matrix) -> str:
    counted = formats.counted(matrix)
    counted += "; no share can be given" if matrix.count == "common" and not matrix.common else ""
    marks = ["\u25a1 white box"] if any(entry.white_box for entry in matrix.entries) else []
    marks += [" ?n: n samples without a valid answer"] if any(entry.unresolved for entry in matrix.entries) else []
    return "; ".join([counted, *(mark.strip() for mark in marks)])


def _cells(summary: Summary, cell: CellSummary) -> list[str]:
    rate = cell.robust_accuracy
    if cell.invalid + cell.error > UNRESOLVED_LIMIT * cell.samples:
        rate = None  # a share of robust samples would read as a success of the attack
    claim = formats.percent(cell.claim.rate.value) + ("" if cell.claim.kind == "claim" else " *")
    claim += " \u2020" if cell.beyond else ""
    incomplete = "" if cell.finished else f" ({cell.samples} of {cell.expected} samples)"
    return [
        summary.attack(cell.attack).name + incomplete,
        formats.radius(cell.eps),
        formats.NONE if rate is None else formats.percent(rate.value),
        formats.NONE if rate is None else formats.interval(rate),
        formats.percent(cell.success.value),
        claim,
        f"{cell.invalid}/{cell.error}",
        formats.distance(cell.median_distance),
        formats.count(cell.cost.forwards),
        formats.count(cell.cost.backwards),
        formats.seconds(cell.cost.seconds),
    ]


def _in_order(summary: Summary, subject: Subject) -> list[CellSummary]:
    mine = [cell for cell in summary.cells if cell.subject == subject.number]
    return sorted(mine, key=lambda cell: (cell.eps is None, cell.eps or 0.0, cell.attack))


def _diagnosis(summary: Summary, subject: Subject) -> Text:
    one = summary.diagnoses[subject.number]
    text = f"diagnosis: {formats.diagnosis(one)}; {formats.adaptive(one, summary)}"
    return Text(text, style="bold" if one.findings else "dim")


def _headline(summary: Summary, case: WorstCase) -> Text:
    where = f"eps {formats.radius(case.eps)}: "
    if case.refused:
        return Text(f"{where}no headline: {formats.unresolved(summary, case)}", style="bold")
    value = formats.percent(case.low.value)
    if case.unresolved:
        value = f"{formats.percent(case.low.value)} to {formats.percent(case.high.value)}"
    span = formats.span(case.low.low, case.high.high)
    attacks = "these attacks" if summary.finished else "the attacks so far"
    text = f"{where}robust accuracy {value} [{span}], an upper bound under {attacks}"
    return Text(f"{text}; clean accuracy {formats.percent(case.clean.value)}", style="bold")

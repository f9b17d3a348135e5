"""The results of a run, as a program takes them up."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from robplug.referee.entries import list_attacks
from robplug.referee.quality import Quality
from robplug.referee.rundir import Run, load_run
from robplug.referee.store import write_atomically, write_json
from robplug.referee.summary import Summary, cells_of, summarise
from robplug.referee.table import ResultsTable
from robplug.referee.worst import per_sample

SUMMARY_SCHEMA_VERSION = 1


class Results:
    """What a run directory holds, finished or not.

    Args:
        path: the run directory.

    Raises:
        StoreError: it is none, or is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._run: Run = load_run(self.path)

    def __repr__(self) -> str:
        state = "finished" if self._run.finished else "unfinished"
        return f"Results({str(self.path)!r}, {len(self._run.cells)} cells, {state})"

    @cached_property
    def _summary(self) -> Summary:
        return summarise(self._run)

    def summary(self) -> Summary:
        """Returns the numbers of the run."""
        return self._summary

    def rows(self) -> list[dict[str, Any]]:
        """Returns a row a sample a cell: the fields of `robplug.SampleResult`, and which cell it is.

        Distances are not a number where there is no adversarial example to measure.
        """
        return list(self._rows())

    def table(self) -> ResultsTable:
        """Returns the table that ``robplug run`` prints; it goes into ``print`` or into rich's."""
        return ResultsTable(self._summary)

    def report(self, path: str | Path | None = None) -> Path:
        """Writes the report, one HTML file that needs nothing else.

        Args:
            path: of the file; ``report.html`` in the run directory without.

        Returns:
            The path.

        Raises:
            RobplugError: the extra ``report`` is not installed.
        """
        from robplug.referee.report import write_report

        return write_report(self._run, path)

    def export(self) -> list[Path]:
        """Writes summary.json, summary.csv, samples.csv, worst-case.csv and transfer.csv into the run directory.

        Returns:
            Their paths.
        """
        summary = self._summary
        content = {"schema_version": SUMMARY_SCHEMA_VERSION, **dataclasses.asdict(summary)}
        write_json(self.path / "summary.json", content)
        names = ["summary.csv", "samples.csv", "worst-case.csv"]
        tables = [_summary_rows(summary), _sample_rows(self._rows(), summary), _worst_rows(self._run, summary)]
        if summary.matrices:
            names.append("transfer.csv")
            tables.append(_transfer_rows(summary))
        for name, rows in zip(names, tables, strict=True):
            _write_csv(self.path / name, rows)
        return [self.path / name for name in ("summary.json", *names)]

    def _rows(self) -> Iterator[dict[str, Any]]:
        targets = {cell.key: self._summary.subjects[cell.subject].target for cell in self._summary.cells}
        numbers = list_attacks(self._run.cells)[1]
        names = [self._summary.attack(number).name for number in numbers]
        for cell, name in zip(self._run.cells, names, strict=True):
            record, threat = cell.record, cell.record["threat"]
            which = {
                "key": record["key"],
                "target": targets.get(record["key"], cell.target),
                "source": cell.source if cell.transferred else None,
                "dataset": record["dataset"],
                "attack": record["attack"],
                "label": name,
                "mode": record["mode"],
                "norm": threat["norm"],
                "eps": threat["eps"],
                "targeted": threat["targeted"],
                "seed": record["seed"],
            }
            for row, measures, scores in zip(cell.table.to_pylist(), cell.measures, cell.scores, strict=True):
                yield {**which, **row, "measures": measures, "scores": scores}


def _sample_rows(rows: Iterator[dict[str, Any]], summary: Summary) -> Iterator[dict[str, Any]]:
    names = _measure_names(summary)
    for row in rows:
        measures, scores = row.pop("measures"), row.pop("scores")
        dense = {"scores": json.dumps(scores)} if summary.dense else {}  # classes differ from sample to sample
        yield {**row, **_columns("measures", measures, names), **dense}


def _measure_names(summary: Summary) -> list[str]:
    return list(dict.fromkeys(name for cell in summary.cells for name in cell.median_measures))


def _columns(field: str, values: Mapping[str, float | None], names: Sequence[str]) -> dict[str, float | None]:
    """Spreads a field over columns; every row of a table needs the same."""
    return {f"{field}.{name}": values.get(name) for name in names}


def _summary_rows(summary: Summary) -> Iterator[dict[str, Any]]:
    names = _measure_names(summary)
    for cell in summary.cells:
        subject, attack = summary.subjects[cell.subject], summary.attack(cell.attack)
        rates = {"clean": cell.clean, "robust_accuracy": cell.robust_accuracy, "success": cell.success}
        yield {
            "target": subject.target,
            "dataset": subject.dataset,
            "norm": subject.norm,
            "eps": cell.eps,
            "targeted": subject.targeted,
            "goal_rule": subject.goal_rule,
            "attack": attack.name,
            "library": attack.library,
            "mode": attack.mode,
            "seed": attack.seed,
            **{name: getattr(cell, name) for name in _COUNTS},
            **{key: value for name, rate in rates.items() for key, value in _rate(name, rate).items()},
            "claim_kind": cell.claim.kind,
            "claim": cell.claim.rate.value,
            "median_distance": cell.median_distance,
            **_columns("median_measures", cell.median_measures, names),
            **_quality(cell.quality, summary),
            **dataclasses.asdict(cell.cost),
        }


def _quality(quality: Quality, summary: Summary) -> dict[str, float | None]:
    """Spreads figures over columns, before and after."""
    names = list(dict.fromkeys(name for cell in summary.cells for name in cell.quality))
    values = {name: quality.get(name, (None, None)) for name in names}
    return {f"{name}, {when}": values[name][i] for name in names for i, when in enumerate(("before", "after"))}


_COUNTS = (
    "expected",
    "samples",
    "misclassified",
    "robust",
    "broken",
    "invalid",
    "error",
    "beyond",
    "silent",
    "false_claims",
    "against_peers",
)


def _rate(name: str, rate: Any) -> dict[str, float | None]:
    ends = (None, None, None) if rate is None else (rate.value, rate.low, rate.high)
    return dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))


def _worst_rows(run: Run, summary: Summary) -> Iterator[dict[str, Any]]:
    for case in summary.worst_cases:
        subject = summary.subjects[case.subject]
        found = per_sample(*cells_of(run, summary, case.subject), case.eps)
        for i, sample in enumerate(found.sample.tolist()):
            by = [number for number, breaks in zip(found.attacks, found.breaks[:, i], strict=True) if breaks]
            yield {
                "target": subject.target,
                "dataset": subject.dataset,
                "norm": subject.norm,
                "eps": case.eps,
                "targeted": subject.targeted,
                "goal_rule": subject.goal_rule,
                "sample": sample,
                "status": str(found.status[i]),
                "broken_by": "; ".join(summary.attack(number).name for number in by),
            }


def _transfer_rows(summary: Summary) -> Iterator[dict[str, Any]]:
    for matrix in summary.matrices:
        for entry in matrix.entries:
            yield {
                "transfer": matrix.number,
                "dataset": matrix.dataset,
                "norm": matrix.norm,
                "eps": matrix.eps,
                "targeted": matrix.targeted,
                "goal_rule": matrix.goal_rule,
                "source": entry.source,
                "attack": summary.attack(entry.attack).name,
                "victim": entry.victim,
                "white_box": entry.white_box,
                "counted": entry.counted,
                "broken": entry.broken,
                "unresolved": entry.unresolved,
                **_rate("success", entry.success),
                **_quality(entry.quality, summary),
            }


def _write_csv(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as handle:
            writer: csv.DictWriter[str] | None = None
            for row in rows:
                if writer is None:
                    names: Sequence[str] = list(row)
                    writer = csv.DictWriter(handle, names, lineterminator="\n")
                    writer.writeheader()
                writer.writerow(row)

    write_atomically(path, write)

"""Libraries that ran the same canonical attack, compared sample by sample."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from robplug.referee.rundir import StoredCell

if TYPE_CHECKING:
    from robplug.referee.summary import CellSummary


def with_peers(cells: list[CellSummary], stored: Sequence[StoredCell]) -> tuple[CellSummary, ...]:
    """Compares harmonised attacks of one canonical name with each other, sample by sample."""
    by_key = {cell.record["key"]: cell for cell in stored}
    groups: dict[str, list[int]] = {}
    for i, cell in enumerate(cells):
        record = by_key[cell.key].record
        if record["mode"] == "harmonised":
            peers = [record["canonical"], record["params_passed"], record["seed"], cell.subject, cell.eps]
            groups.setdefault(json.dumps(peers, sort_keys=True), []).append(i)
    found = list(cells)
    for group in groups.values():
        verdicts = _verdicts([by_key[cells[i].key] for i in group], cells[group[0]].eps)
        for row, i in enumerate(group):
            others = np.delete(verdicts, row, axis=0)
            # votes: +1 broken, -1 robust, 0 no answer; a tie of the others is nobody's fault
            against = verdicts[row] * others.sum(axis=0) < 0
            found[i] = replace(cells[i], against_peers=int(against.sum()))
    return tuple(found)


def _verdicts(cells: list[StoredCell], eps: float | None) -> np.ndarray[Any, Any]:
    """(cells, N) int: +1 broken, -1 robust, 0 anything else."""
    sample = np.unique(np.concatenate([cell.sample for cell in cells]))
    verdicts = np.zeros((len(cells), len(sample)), dtype=int)
    for row, cell in enumerate(cells):
        reading = next(reading for reading in cell.readings if reading.eps == eps)
        answered = np.isin(cell.status, ("robust", "broken"))
        votes = np.where(cell.broken(reading), 1, np.where(answered, -1, 0))
        verdicts[row, np.searchsorted(sample, cell.sample)] = votes
    return verdicts

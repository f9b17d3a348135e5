"""From the rows of a run to the matrix of a transfer: attacks made on one model and judged on others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from robplug.referee.quality import Quality, quality
from robplug.referee.rundir import Reading, Run, StoredCell, printable
from robplug.referee.wilson import Rate, wilson

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Entry:
    """What the adversarial samples of one attack on one source do to one victim.

    Attributes:
        attack: its number.
        source: name of the target that was attacked.
        victim: name of the target that judges.
        white_box: whether the victim is the source, or a part of it.
        counted: samples that count.
        broken: those of them that are broken within the radius.
        unresolved: those without a valid answer, or without a row so far.
        success: broken / counted.
        quality: of a task with many answers a sample, figures over all samples before and after, by name.
    """

    attack: int
    source: str
    victim: str
    white_box: bool
    counted: int
    broken: int
    unresolved: int
    success: Rate
    quality: Quality = field(default_factory=dict)


@dataclass(frozen=True)
class Matrix:
    """One transfer of the plan under one threat.

    Attributes:
        number: of the transfer in the plan, from 0.
        dataset: name of the data.
        norm: of the threat.
        targeted: whether a given class was to be reached.
        goal_rule: how that class was chosen, else "".
        eps: the radius, or None where any distance counts.
        count: ``"common"`` or ``"pairs"``; see `robplug.referee.plan_tables.TransferEntry`.
        common: samples that all models of the matrix classify correctly.
        samples: all samples.
        sources: names, in the order of the plan; sums and permutations of their perturbations follow.
        victims: names, in the order of the plan.
        mixtures: those of the sources that are sums or permutations.
        entries: by source, attack and victim; each source judges what was made on it, whether a victim or not.
    """

    number: int
    dataset: str
    norm: str
    targeted: bool
    goal_rule: str
    eps: float | None
    count: str
    common: int
    samples: int
    sources: tuple[str, ...]
    victims: tuple[str, ...]
    mixtures: tuple[str, ...]
    entries: tuple[Entry, ...]

    @property
    def itself(self) -> list[str]:
        """The sources that judge what was made on them without being victims."""
        return [name for name in self.sources if name not in (*self.victims, *self.mixtures)]

    def entry(self, source: str, attack: int, victim: str) -> Entry | None:
        """Returns an entry, or None if its cell has not begun."""
        asked = (source, attack, victim)
        return next((one for one in self.entries if (one.source, one.attack, one.victim) == asked), None)

    def attacks_on(self, source: str) -> list[int]:
        """Returns the numbers of the attacks that were made on a source."""
        return list(dict.fromkeys(entry.attack for entry in self.entries if entry.source == source))


def matrices(run: Run, numbers: Sequence[int]) -> tuple[Matrix, ...]:
    """Returns a matrix for each transfer, data set, threat and radius of a run.

    Args:
        run: the run.
        numbers: the number of each cell's attack.
    """
    found = []
    for number, record in enumerate(run.record.get("transfers", ())):
        transfer = {key: [printable(name) for name in record[key]] for key in ("sources", "victims")}
        transfer["count"] = record["count"]
        mixtures = [printable(name) for name in record.get("mixtures", ())]
        transfer["made"] = [*transfer["sources"], *mixtures]
        pairs = {(source, victim) for source in transfer["made"] for victim in (source, *transfer["victims"])}
        own = [(cell, of) for cell, of in zip(run.cells, numbers, strict=True) if (cell.source, cell.target) in pairs]
        threats = {_threat(cell): None for cell, _ in own}
        for threat in threats:
            mine = [(cell, of) for cell, of in own if _threat(cell) == threat]
            radii = {reading.eps for cell, _ in mine for reading in cell.readings}
            ordered = sorted(radii, key=lambda eps: (eps is None, eps or 0.0))
            found += [_matrix(run, number, transfer, mine, eps) for eps in ordered]
    return tuple(found)


def _threat(cell: StoredCell) -> str:
    threat = cell.record["threat"]
    parts = [cell.record["dataset"], cell.record["digests"]["data"], threat["norm"], threat["bounds"]]
    return json.dumps([*parts, threat["targeted"], cell.record["goal_rule"]])


def _matrix(
    run: Run, number: int, transfer: dict[str, Any], cells: list[tuple[StoredCell, int]], eps: float | None
) -> Matrix:
    record = cells[0][0].record
    samples = max(cell.expected for cell, _ in cells)
    sources, victims = transfer["sources"], transfer["victims"]
    same_data = [cell for cell in run.cells if cell.record["digests"]["data"] == record["digests"]["data"]]
    right = {name: _right(same_data, name, samples) for name in {*sources, *victims}}
    common = np.logical_and.reduce(list(right.values()))
    entries = []
    for cell, attack in cells:
        reading = next((reading for reading in cell.readings if reading.eps == eps), None)
        if reading is not None:
            parts = cell.parts
            of_pair = np.logical_and.reduce([right[name] for name in (*parts, cell.target)])
            counts = common if transfer["count"] == "common" else of_pair
            white_box = any(cell.target == part or cell.target in _members(run, part) for part in parts)
            entries.append(_entry(cell, attack, reading, counts, white_box))
    order = {name: place for place, name in enumerate((*transfer["made"], *victims))}
    return Matrix(
        number=number,
        dataset=record["dataset"],
        norm=record["threat"]["norm"],
        targeted=bool(record["threat"]["targeted"]),
        goal_rule=record["goal_rule"] or "",
        eps=eps,
        count=transfer["count"],
        common=int(common.sum()),
        samples=samples,
        sources=tuple(transfer["made"]),
        victims=tuple(victims),
        mixtures=tuple(transfer["made"][len(sources) :]),
        entries=tuple(sorted(entries, key=lambda one: (order[one.source], one.attack, order[one.victim]))),
    )


def _members(run: Run, target: str) -> list[str]:
    named = run.record.get("members", {}).items()
    return [printable(member) for name, members in named if printable(name) == target for member in members]


def _right(cells: Sequence[StoredCell], target: str, samples: int) -> Array:
    """(samples,) bool: known to be read right in every cell that has the target, with something to attack."""
    known, right = np.zeros(samples, dtype=bool), np.ones(samples, dtype=bool)
    for cell in cells:
        if cell.target == target:
            known[cell.sample] = True
            right[cell.sample] &= cell.column("prediction") == cell.column("y")
            if not cell.transferred:  # elsewhere it says that the source was not attacked
                right[cell.sample] &= cell.status != "unattacked"
    return known & right


def _entry(cell: StoredCell, attack: int, reading: Reading, counts: Array, white_box: bool) -> Entry:
    broken, answered = np.zeros(len(counts), dtype=bool), np.zeros(len(counts), dtype=bool)
    broken[cell.sample] = cell.broken(reading)
    answered[cell.sample] = np.isin(cell.status, ("robust", "broken"))
    counted, hit = int(counts.sum()), int((broken & counts).sum())
    return Entry(
        attack=attack,
        source=cell.source,
        victim=cell.target,
        white_box=white_box,
        counted=counted,
        broken=hit,
        unresolved=int((~answered & counts).sum()),
        success=wilson(hit, counted),
        quality=quality(cell, reading),
    )

"""Writes run directories with rows made by hand, through the store itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from robplug.referee.store import Store
from robplug.types import SampleResult, Status

STATUSES: dict[str, Status] = {
    "m": "misclassified",
    "r": "robust",
    "b": "broken",
    "i": "invalid",
    "e": "error",
    "u": "unattacked",
}
NAN = float("nan")


@dataclass(frozen=True)
class MadeCell:
    """A cell, a letter of `STATUSES` a sample: what is not said is unremarkable."""

    statuses: str
    label: str = "pgd · art"
    target: str = "net"
    dataset: str = "digits"
    norm: str = "linf"
    eps: float | None = 0.1
    readings: Sequence[tuple[float, float]] | None = None
    distances: Sequence[float] | None = None
    measures: Sequence[dict[str, float]] | None = None
    claims: Sequence[bool | None] | None = None
    predictions_adv: Sequence[int] | None = None
    silent: Sequence[int] = ()
    notes: dict[int, str] = field(default_factory=dict)
    targeted: bool = False
    goal_rule: str = ""
    seed: int = 0
    mode: str = "harmonised"
    needs: str = "gradients"
    params_passed: dict[str, Any] = field(default_factory=dict)
    params_in_force: dict[str, Any] = field(default_factory=dict)
    weights: str = "a" * 64
    data: str = "d" * 64
    samples: int | None = None
    chunk_notes: Sequence[str] = ()
    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0
    images: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    @property
    def budget(self) -> str:
        return "minimal" if self.eps is None else "fixed"

    def key(self, index: int) -> str:
        return hashlib.sha256(f"{index} {self!r}".encode()).hexdigest()

    def rows(self) -> list[SampleResult]:
        distances = self.distances or [NAN if letter in "meu" else self.eps or 0.05 for letter in self.statuses]
        measures = self.measures or [{}] * len(self.statuses)
        claims = self.claims or [None] * len(self.statuses)
        after = self.predictions_adv or [_prediction(letter) for letter in self.statuses]
        return [
            SampleResult(
                sample=i,
                y=0,
                y_goal=1 if self.targeted else -1,
                prediction=2 if letter == "m" else 0,
                prediction_adv=after[i],
                status=STATUSES[letter],
                distance=float(distances[i]),
                excess=0.0,
                claim=claims[i],
                silent=i in self.silent,
                forwards=None,
                backwards=None,
                note=self.notes.get(i, ""),
                measures=measures[i],
            )
            for i, letter in enumerate(self.statuses)
        ]


def _prediction(letter: str) -> int:
    return {"m": -1, "e": -1, "b": 1, "u": -1}.get(letter, 0)


def write_run(path: Path, made: Sequence[MadeCell], chunk: int = 4, **record: Any) -> Path:
    """Writes a run directory and returns its path.

    Args:
        path: of the directory.
        made: the cells in the order of the plan.
        chunk: samples a chunk.
        **record: what run.json has beside or instead of the usual.
    """
    store = Store(path)
    usual = {
        "robplug": "0.1.0",
        "plan": {"targets": [{"name": cell.target} for cell in made], "chunk": chunk},
        "plan_file": "plan.toml",
        "command": "robplug run plan.toml",
        "created": "2026-01-02T03:04:05Z",
        "hardware": {"cpu": "a processor", "cores": 2, "gpu": None, "memory_gib": 4.0},
        "versions": {"python": "3.11.0", "torch": "2.13.0"},
    }
    store.write_run({**usual, **record})
    for index, cell in enumerate(made):
        _write_cell(store, index, cell, chunk)
    return path


def _write_cell(store: Store, index: int, cell: MadeCell, size: int) -> None:
    rows, key = cell.rows(), cell.key(index)
    where = store.cell(key)
    where.write_record({})  # makes the directory
    chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
    for number, part in enumerate(chunks):
        where.write_rows(number, part)
    if cell.images is not None:
        sample, x, x_adv = cell.images
        where.write_arrays("examples.safetensors", {"sample": sample, "x": x, "x_adv": x_adv})
    where.write_record(_record(index, key, cell, [len(part) for part in chunks]))


def _record(index: int, key: str, cell: MadeCell, sizes: list[int]) -> dict[str, Any]:
    expected = cell.samples or len(cell.statuses)
    readings = cell.readings if cell.readings is not None else [(cell.eps, cell.eps)] if cell.eps is not None else []
    library = cell.label.rpartition(" · ")[2].partition("/")[0]
    canonical = cell.label.partition(" · ")[0] if " · " in cell.label and cell.mode == "harmonised" else None
    share = max(len(sizes), 1)
    return json.loads(
        json.dumps(
            {
                "key_version": 1,
                "key": key,
                "index": index,
                "target": cell.target,
                "dataset": cell.dataset,
                "attack": f"{library}/{canonical or 'attack'}",
                "label": cell.label,
                "canonical": canonical,
                "library": library,
                "mode": cell.mode,
                "threat": {"norm": cell.norm, "eps": cell.eps, "bounds": [0.0, 1.0], "targeted": cell.targeted},
                "goal_rule": cell.goal_rule,
                "seed": cell.seed,
                "budget": cell.budget,
                "needs": cell.needs,
                "params_passed": cell.params_passed,
                "params_in_force": cell.params_in_force or cell.params_passed,
                "readings": [{"eps": eps, "allowed": allowed} for eps, allowed in readings],
                "digests": {"weights": cell.weights, "model_source": "c" * 64, "data": cell.data, "plugin": ""},
                "versions": {"robplug": "0.1.0"},
                "device": "cpu",
                "torch": "2.13.0",
                "target_info": {"stochastic": False, "eot": 1, "draws": 1},
                "samples": expected,
                "state": "finished" if sum(sizes) == expected else "unfinished",
                "chunks": [
                    {
                        "index": i,
                        "samples": size,
                        "seconds": cell.seconds / share,
                        "forwards": cell.forwards // share,
                        "backwards": cell.backwards // share,
                        "notes": list(cell.chunk_notes),
                    }
                    for i, size in enumerate(sizes)
                ],
            }
        )
    )

"""Reading a run directory back. Nothing here imports torch, and nothing here runs what a plan names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from robplug.errors import StoreError
from robplug.referee.store import SCHEMA, SCHEMA_VERSION

KEY = re.compile(r"[0-9a-f]{16,64}")


@dataclass(frozen=True)
class Reading:
    """A radius at which a cell is read.

    Attributes:
        eps: the radius, or None where any distance counts.
        allowed: largest distance that counts as inside.
    """

    eps: float | None
    allowed: float


@dataclass(frozen=True)
class StoredCell:
    """One cell as it lies on disk.

    Attributes:
        path: its directory.
        record: content of cell.json.
        table: the rows of its finished chunks.
    """

    path: Path
    record: dict[str, Any]
    table: pa.Table

    @property
    def target(self) -> str:
        """Name of the model that judges."""
        return printable(self.record["target"])

    @property
    def source(self) -> str:
        """Name of the model that was attacked."""
        return printable(self.record.get("source") or self.record["target"])

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the models whose perturbations are judged; the one that was attacked where nothing is added."""
        return tuple(printable(name) for name in self.record.get("parts", ())) or (self.source,)

    @property
    def transferred(self) -> bool:
        """Whether its adversarial samples were made on another model."""
        return bool(self.record.get("source"))

    @property
    def minimal(self) -> bool:
        """Whether the attack looked for the smallest distance."""
        return bool(self.record["budget"] == "minimal")

    @property
    def targeted(self) -> bool:
        """Whether a given class was to be reached."""
        return bool(self.record["threat"]["targeted"])

    @property
    def expected(self) -> int:
        """Number of samples that the finished cell has."""
        return int(self.record["samples"])

    @property
    def finished(self) -> bool:
        """Whether every chunk is there."""
        return bool(self.record["state"] == "finished")

    @property
    def readings(self) -> tuple[Reading, ...]:
        """The radii of the plan at which it is read; the one reading without a radius if the plan has none for it."""
        found = tuple(Reading(float(one["eps"]), float(one["allowed"])) for one in self.record["readings"])
        return found or (Reading(None, float("inf")),)

    @cached_property
    def sample(self) -> np.ndarray[Any, Any]:
        """(N,) indices in the data set."""
        return self.column("sample")

    @cached_property
    def status(self) -> np.ndarray[Any, Any]:
        """(N,) statuses as stored."""
        return np.array(self.table["status"].to_pylist(), dtype="U13")

    @cached_property
    def distance(self) -> np.ndarray[Any, Any]:
        """(N,) float64 distances."""
        return self.column("distance")

    @cached_property
    def claim(self) -> np.ndarray[Any, Any]:
        """(N,) int8: 1 claimed, 0 not claimed, -1 no claim made."""
        return np.array([-1 if value is None else int(value) for value in self.table["claim"].to_pylist()], np.int8)

    @cached_property
    def measures(self) -> list[dict[str, float]]:
        """What the norm measured beside the distance, a row a sample."""
        return [dict(pairs) for pairs in self.table["measures"].to_pylist()]

    @cached_property
    def scores(self) -> list[dict[str, float]]:
        """What the task measures of the answers, a row a sample."""
        return [dict(pairs) for pairs in self.table["scores"].to_pylist()]

    def column(self, name: str) -> np.ndarray[Any, Any]:
        """Returns a column without nulls."""
        return self.table[name].to_numpy()  # type: ignore[no-any-return]

    def broken(self, reading: Reading) -> np.ndarray[Any, Any]:
        """(N,) bool: a valid adversarial example within the radius is at hand.

        The verdict on a fixed-budget attack stands at its own radius; elsewhere the measured distance decides.
        """
        found: np.ndarray[Any, Any] = self.status == "broken"
        own = not self.minimal and reading.eps == self.record["threat"]["eps"]
        return found if own else found & (self.distance <= reading.allowed)


@dataclass(frozen=True)
class Run:
    """A run directory.

    Attributes:
        path: of the directory.
        record: content of run.json.
        cells: those of the plan that have begun, in its order.
        not_begun: number of cells of the plan that have not.
        left_aside: number of cells in the directory that are not of the plan as it was last run.
        probes: the probes of the plan that were run: what they are, and what they measured.
    """

    path: Path
    record: dict[str, Any]
    cells: tuple[StoredCell, ...]
    not_begun: int
    left_aside: int
    probes: tuple[dict[str, Any], ...] = ()

    @property
    def own(self) -> tuple[StoredCell, ...]:
        """The cells whose attack was made on the model that judges it."""
        return tuple(cell for cell in self.cells if not cell.transferred)

    @property
    def finished(self) -> bool:
        """Whether every cell has all its rows."""
        return self.not_begun == 0 and all(cell.finished for cell in self.cells)


def printable(name: str) -> str:
    """Returns a name without signs that could steer a terminal: a run may come from somebody else."""
    return "".join(sign if sign.isprintable() else "\ufffd" for sign in name)


def load_run(path: str | Path) -> Run:
    """Reads a run directory, finished or not.

    Raises:
        StoreError: it is no run directory, is damaged, or was written by a newer robplug.
    """
    root = Path(path)
    if not (root / "run.json").is_file():
        raise StoreError(root, "has no run.json; expected a run directory, such as the --out of `robplug run`")
    record = _read_json(root / "run.json", "run the plan again to have it written anew; finished work is kept")
    there = {folder.name: folder for folder in (root / "cells").glob("*") if (folder / "cell.json").is_file()}
    # cells of an older plan stay on disk for reuse; run.json names those of the present one
    planned = [_folder_name(root, key) for key in record["cells"]] if "cells" in record else sorted(there)
    cells = [load_cell(there[name]) for name in planned if name in there]
    return Run(
        root,
        record,
        tuple(sorted(cells, key=lambda cell: int(cell.record["index"]))),
        not_begun=sum(name not in there for name in planned),
        left_aside=len(set(there) - set(planned)),
        probes=tuple(_probes(root, record.get("probes", ()))),
    )


def _probes(root: Path, planned: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for probe in planned:
        path = root / "probes" / f"{_folder_name(root, probe['key'])}.json"
        if path.is_file():
            yield {**_read_json(path, "remove it and run the plan again"), **probe}


def _folder_name(root: Path, key: Any) -> str:
    if not (isinstance(key, str) and KEY.fullmatch(key)):
        raise StoreError(root / "run.json", f"expected keys of cells in hexadecimal digits, got {key!r}")
    return key[:16]


def load_cell(folder: Path) -> StoredCell:
    """Reads one cell."""
    record = _read_json(folder / "cell.json", f"remove {folder} to run this cell again")
    parts = [_read_rows(folder / f"samples-{int(chunk['index']):05d}.parquet") for chunk in record["chunks"]]
    table = pa.concat_tables(parts).sort_by("sample") if parts else SCHEMA.empty_table()
    samples = table["sample"].to_numpy()
    if len(np.unique(samples)) < len(samples):
        raise StoreError(folder, "holds a sample twice; remove it to run this cell again")
    return StoredCell(folder, record, table)


def _read_rows(path: Path) -> pa.Table:
    try:
        table = pq.read_table(path, partitioning=None)
        if "scores" not in table.column_names:  # written before there were tasks with scores
            table = table.append_column(
                SCHEMA.field("scores"), pa.array([[]] * len(table), SCHEMA.field("scores").type)
            )
        return table.select(SCHEMA.names).cast(SCHEMA)
    except (OSError, KeyError, pa.ArrowException) as error:
        problem = f"is missing or damaged ({str(error).splitlines()[0]})"
        raise StoreError(path, f"{problem}; remove {path.parent} to run this cell again") from None


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(path, f"is damaged ({error}); {remedy}") from None
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        raise StoreError(
            path, f"has schema_version {version}, and this robplug reads {SCHEMA_VERSION}; upgrade robplug"
        )
    return content  # type: ignore[no-any-return]

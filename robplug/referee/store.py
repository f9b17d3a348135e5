"""The run directory: what is finished stays finished.

    out/run.json                             the plan and where it ran
    out/cells/<key>/cell.json                what the cell is, and its finished chunks
    out/cells/<key>/samples-00000.parquet    a row per sample, a file per chunk
    out/cells/<key>/started-00000            left by a chunk that has begun; holds the number of its starts
    out/cells/<key>/examples.safetensors     some images, for the report
    out/cells/<key>/adversarials-00000.safetensors   all adversarial samples of a chunk, where they are kept
    out/cells/<key>/trace-00000.safetensors          what an attack followed step by step, where it says so
    out/cells/<key>/answers-00000.safetensors        boxes and answers of a chunk, where the task needs them together
    out/probes/<key>.json                    what was measured of a model beside its cells

Every file is written under a temporary name, synced and renamed, so that a reader sees the old content or the new.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from robplug.errors import StoreError
from robplug.types import SampleResult

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA_VERSION = 1
SCHEMA = pa.schema(
    [
        ("sample", pa.int64()),
        ("y", pa.int64()),
        ("y_goal", pa.int64()),
        ("prediction", pa.int64()),
        ("prediction_adv", pa.int64()),
        ("status", pa.string()),
        ("distance", pa.float64()),
        ("excess", pa.float64()),
        ("claim", pa.bool_()),
        ("silent", pa.bool_()),
        ("forwards", pa.int64()),
        ("backwards", pa.int64()),
        ("note", pa.string()),
        ("measures", pa.map_(pa.string(), pa.float64())),
        ("scores", pa.map_(pa.string(), pa.float64())),
    ]
)


class Store:
    """A run directory.

    Args:
        path: made if it is not there.

    Raises:
        StoreError: it cannot be made or written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with explained(self.path):
            (self.path / "cells").mkdir(parents=True, exist_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the directory for this process; the lock ends with the process, however it ends.

        Raises:
            StoreError: another process holds it.
        """
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise StoreError(
                self.path, "another process is running in it; wait for it, or choose another --out"
            ) from None
        except OSError as error:
            raise StoreError(self.path, f"cannot be locked: {error.strerror or error}") from None
        try:
            yield
        finally:
            lock.release()

    def write_run(self, record: Mapping[str, Any]) -> None:
        """Writes run.json."""
        write_json(self.path / "run.json", {"schema_version": SCHEMA_VERSION, **record})

    def probe_path(self, key: str) -> Path:
        """Returns where a probe is stored."""
        return self.path / "probes" / f"{key[:16]}.json"

    def write_probe(self, key: str, record: Mapping[str, Any]) -> None:
        """Writes what a probe measured."""
        write_json(self.probe_path(key), {"schema_version": SCHEMA_VERSION, **record})

    def cell(self, key: str) -> CellStore:
        """Returns the part of the store that holds one cell."""
        return CellStore(self.path / "cells" / key[:16])


class CellStore:
    """The directory of a cell.

    Args:
        path: made by the first write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def record(self) -> dict[str, Any] | None:
        """Returns cell.json, or None if there is none."""
        path = self.path / "cell.json"
        if not path.exists():
            return None
        with explained(path):
            try:
                return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
            except ValueError as error:
                raise StoreError(path, f"is damaged ({error}); remove {self.path} to run this cell again") from None

    def finished(self) -> set[int]:
        """Returns the chunks whose rows are on disk and recorded."""
        record = self.record()
        return {chunk["index"] for chunk in record["chunks"]} if record else set()

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Writes cell.json."""
        with explained(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "cell.json", {"schema_version": SCHEMA_VERSION, **record})

    def write_rows(self, chunk: int, rows: list[SampleResult]) -> None:
        """Writes the rows of a chunk."""
        maps = ("measures", "scores")
        columns = [{**vars(row), **{name: list(vars(row)[name].items()) for name in maps}} for row in rows]
        table = pa.Table.from_pylist(columns, schema=SCHEMA)
        write_atomically(self._file("samples", chunk, ".parquet"), lambda path: pq.write_table(table, path))

    def write_text(self, name: str, text: str) -> None:
        """Writes a text file, such as a traceback."""
        write_atomically(self.path / name, lambda path: path.write_text(text, encoding="utf-8"))

    def write_arrays(self, name: str, arrays: Mapping[str, Any]) -> None:
        """Writes numpy arrays as safetensors."""
        from safetensors.numpy import save

        write_atomically(self.path / name, lambda path: path.write_bytes(save(dict(arrays))))

    def has_adversarials(self, chunk: int) -> bool:
        """Returns whether the adversarial samples of a chunk are stored."""
        return self._file("adversarials", chunk, ".safetensors").exists()

    def write_tensors(self, kind: str, chunk: int, tensors: Mapping[str, Tensor]) -> None:
        """Writes tensors of a chunk: its ``adversarials`` or ``answers``."""
        from safetensors.torch import save

        content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        write_atomically(self._file(kind, chunk, ".safetensors"), lambda path: path.write_bytes(content))

    def tensors(self, kind: str, chunk: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Returns what `write_tensors` has stored.

        Raises:
            StoreError: they are missing or damaged, or one of these names is not among them.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        path = self._file(kind, chunk, ".safetensors")
        with explained(path):
            try:
                tensors = load(path.read_bytes())
            except SafetensorError as error:
                raise StoreError(path, f"is damaged ({error}); remove {self.path} to run this cell again") from None
        for name in names:
            if name not in tensors:
                raise StoreError(path, f"is damaged (no {name}); remove {self.path} to run this cell again")
        return tensors

    def forget(self) -> None:
        """Removes cell.json, so that the cell begins anew."""
        with explained(self.path):
            (self.path / "cell.json").unlink(missing_ok=True)

    def heartbeat_path(self, chunk: int) -> Path:
        """Returns where a running chunk leaves its heartbeat."""
        return self._file("started", chunk, "")

    def _file(self, kind: str, chunk: int, suffix: str) -> Path:
        return self.path / f"{kind}-{chunk:05d}{suffix}"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file atomically."""
    text = json.dumps(content, indent=1, sort_keys=False, ensure_ascii=False, allow_nan=False)
    write_atomically(path, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))


def write_atomically(path: Path, write: Any) -> None:
    """Writes through a temporary file: fsync, rename, fsync of the directory.

    Raises:
        StoreError: the disk is full or the directory cannot be written; the old file is whole then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with explained(path):
        try:
            write(temporary)
            with temporary.open("rb+") as handle:
                os.fsync(handle.fileno())
            temporary.replace(path)
            _sync_directory(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _sync_directory(path: Path) -> None:
    if os.name == "posix":  # elsewhere a directory cannot be opened
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns an OSError into a StoreError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            problem = "the disk is full; free some space and run the same command again, finished work is kept"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            problem = "cannot be written; change its permissions or choose another --out"
        else:
            problem = f"{error.strerror or error}"
        raise StoreError(path, problem) from error

"""The store: atomic, locked, explained."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from robplug.errors import StoreError
from robplug.referee.heartbeat import Heartbeat
from robplug.referee.store import CellStore, Store, write_atomically, write_json
from robplug.types import SampleResult

ROW = SampleResult(
    sample=4,
    y=1,
    y_goal=-1,
    prediction=1,
    prediction_adv=2,
    status="broken",
    distance=0.1,
    excess=0.0,
    claim=None,
    silent=False,
    forwards=None,
    backwards=3,
    note="",
)


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    store = CellStore(tmp_path)
    store.write_rows(0, [ROW])
    assert pq.read_table(tmp_path / "samples-00000.parquet").to_pylist() == [
        {**vars(ROW), "measures": [], "scores": []}
    ]


def test_a_write_that_breaks_midway_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "cell.json"
    write_json(path, {"a": 1})

    def half(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StoreError, match="the disk is full; free some space"):
        write_atomically(path, half)
    assert path.read_text() == '{\n "a": 1\n}\n'
    assert [entry.name for entry in tmp_path.iterdir()] == ["cell.json"]


def test_a_directory_that_cannot_be_made_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=str(tmp_path / "file")):
        Store(tmp_path / "file" / "run")


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is a Linux device")
def test_a_full_disk_is_named(tmp_path: Path) -> None:
    """/dev/full fails every write with ENOSPC, as a full disk does."""
    with pytest.raises(StoreError, match="disk is full"):
        write_atomically(tmp_path / "rows", lambda path: _write_full())


def _write_full() -> None:
    with Path("/dev/full").open("w") as handle:
        handle.write("x" * 100_000)


def test_damage_is_named(tmp_path: Path) -> None:
    (tmp_path / "cell.json").write_text("{half")
    with pytest.raises(StoreError, match=r"is damaged.*remove"):
        CellStore(tmp_path).record()


def test_the_lock_holds_between_processes_and_ends_with_them(tmp_path: Path) -> None:
    code = (
        "import sys, time; from robplug.referee.store import Store\n"
        f"with Store({str(tmp_path)!r}).locked():\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(StoreError, match="another process is running in it"), Store(tmp_path).locked():
        pass
    process.kill()
    process.wait()
    with Store(tmp_path).locked():
        pass


def killed_at(path: Path, calls: int) -> bool:
    """Starts a chunk, makes some calls and dies: returns whether it was begun at all."""
    heart = Heartbeat(path)
    begun = heart.begin()
    if begun:
        heart.beat(calls)
    return begun


def test_a_chunk_that_dies_twice_at_one_place_is_given_up(tmp_path: Path) -> None:
    path = tmp_path / "started-00000"
    assert killed_at(path, 7) and killed_at(path, 7) and not killed_at(path, 7)


def test_a_chunk_that_was_killed_at_several_places_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "started-00000"
    assert all(killed_at(path, calls) for calls in (7, 9, 3, 12, 4, 5, 6, 8, 1, 2))


def test_a_finished_chunk_leaves_no_heartbeat(tmp_path: Path) -> None:
    heart = Heartbeat(tmp_path / "started-00000")
    heart.begin()
    heart.beat(3)
    heart.end()
    assert list(tmp_path.iterdir()) == []


def test_deaths_after_the_attack_are_never_alike(tmp_path: Path) -> None:
    path = tmp_path / "started-00000"
    for _ in range(4):
        heart = Heartbeat(path)
        assert heart.begin()
        heart.beat(7)
        heart.survived()


def test_the_heartbeat_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "started-00000"
    code = (
        "import os, signal; from pathlib import Path; from robplug.referee.heartbeat import Heartbeat\n"
        f"heart = Heartbeat(Path({str(path)!r})); heart.begin(); heart.beat(5); os.kill(os.getpid(), signal.SIGKILL)"
    )
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert not Heartbeat(path).begin()


def test_temporary_files_bear_the_process(tmp_path: Path) -> None:
    """Two processes never write to one temporary file."""
    names = []
    write_atomically(tmp_path / "a", lambda path: names.append(path.name) or path.write_text("x"))
    assert names == [f".a.{os.getpid()}.tmp"]

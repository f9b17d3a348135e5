"""Whole runs: rows, resume, kills, failures, exit codes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import robplug
from robplug.errors import PlanError, StoreError
from robplug.plugins import registry
from robplug.referee.outlook import outlook

PLAN: dict[str, Any] = {
    "probes": 0,
    "targets": [{"name": "robplug/digits-standard"}],
    "datasets": [{"name": "digits", "samples": 24}],
    "threats": [{"norm": "linf", "eps": [0.1, 0.2]}],
    "attacks": [{"name": "robplug/pgd", "steps": 5}, {"name": "robplug/noise"}],
    "chunk": 10,
}


def stored(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Returns the rows of every cell, by key."""
    cells = sorted((path / "cells").iterdir())
    return {
        cell.name: [row for file in sorted(cell.glob("samples-*")) for row in pq.read_table(file).to_pylist()]
        for cell in cells
    }


def toml(path: Path, **changes: Any) -> Path:
    """Writes a plan as TOML (JSON values are TOML values for all that is used here)."""
    plan = {**PLAN, **changes}
    lines = [f"{key} = {json.dumps(value)}" for key, value in plan.items() if not isinstance(value, list)]
    for key, entries in plan.items():
        if isinstance(entries, list):
            for entry in entries:
                lines += [f"[[{key}]]", *(f"{name} = {json.dumps(value)}" for name, value in entry.items())]
    path.write_text("\n".join(lines))
    return path


def command(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    code = "from robplug.cli import main; main()"
    words = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False, **options)


def test_a_run_has_a_row_for_each_sample_of_each_cell(tmp_path: Path) -> None:
    results = robplug.evaluate(PLAN, out=tmp_path)
    rows = stored(tmp_path)
    assert len(rows) == 4 and all([row["sample"] for row in cell] == list(range(24)) for cell in rows.values())
    assert len(results.rows()) == 4 * 24
    cells = [json.loads((cell / "cell.json").read_text()) for cell in (tmp_path / "cells").iterdir()]
    assert {cell["state"] for cell in cells} == {"finished"}
    assert all(sum(chunk["samples"] for chunk in cell["chunks"]) == 24 for cell in cells)
    assert not list(tmp_path.rglob("started-*")) and not list(tmp_path.rglob("*.tmp"))


def test_finished_work_is_not_repeated(tmp_path: Path) -> None:
    robplug.evaluate(PLAN, out=tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("samples-*")}
    robplug.evaluate({**PLAN, "attacks": [*PLAN["attacks"], {"name": "robplug/fgsm"}]}, out=tmp_path)
    assert len(stored(tmp_path)) == 6
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())


def test_what_changes_the_numbers_changes_the_key(tmp_path: Path) -> None:
    keys = {row.key for row in outlook(_save(tmp_path, PLAN), registry())}
    for change in (
        {"seed": 1},
        {"chunk": 11},
        {"batch_size": 100},
        {"datasets": [{"name": "digits", "samples": 23}]},
        {"targets": [{"name": "robplug/digits-at"}]},
        {"attacks": [{"name": "robplug/pgd", "steps": 6}, {"name": "robplug/noise", "draws": 9}]},
        {"threats": [{"norm": "linf", "eps": [0.11, 0.21]}]},
    ):
        assert not keys & {row.key for row in outlook(_save(tmp_path, {**PLAN, **change}), registry())}, change
    renamed = {**PLAN, "targets": [{"name": "other", "make": "robplug/digits-standard"}]}
    assert keys == {row.key for row in outlook(_save(tmp_path, renamed), registry())}


def _save(folder: Path, plan: dict[str, Any]) -> Path:
    return toml(folder / "plan.toml", **plan)


def test_a_killed_run_resumed_equals_one_that_was_not(tmp_path: Path) -> None:
    """SIGKILL at random moments; the rows are those of an uninterrupted run, bit for bit."""
    plan = toml(tmp_path / "plan.toml", chunk=3)
    robplug.evaluate(plan, out=tmp_path / "whole")
    draw = random.Random(0)
    out = tmp_path / "killed"
    words = [sys.executable, "-c", "from robplug.cli import main; main()", "run", plan, "--out", out, "--no-report"]
    for _ in range(3):
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        enough = len(list(out.rglob("samples-*"))) + draw.randint(1, 6)
        while len(list(out.rglob("samples-*"))) < enough:
            assert process.poll() is None
            time.sleep(draw.random() / 100)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(stored(out)) < 4 or not all(len(rows) == 24 for rows in stored(out).values())
    assert subprocess.run(words, check=False, capture_output=True).returncode == 0
    assert stored(out) == stored(tmp_path / "whole")


def test_ctrl_c_stores_exits_130_and_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time, torch\n"
        "class Slow(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        time.sleep(0.05)\n"
        "        return x.flatten(1)[:, :10]\n"
    )
    plan = toml(tmp_path / "plan.toml", targets=[{"name": "slow", "make": "slow.py:Slow"}], chunk=2)
    out = tmp_path / "out"
    words = [sys.executable, "-c", "from robplug.cli import main; main()", "run", plan, "--out", out]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not list(out.rglob("samples-*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "To go on" in errors and "--out" in errors
    assert not list(out.rglob("started-*"))


def test_one_failing_attack_does_not_stop_the_rest(tmp_path: Path) -> None:
    """A model that fails on large batches of noise: pgd goes through, the run ends with exit code 1."""
    (tmp_path / "fragile.py").write_text(
        "import torch\n"
        "class Fragile(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        if x.requires_grad:\n"
        "            raise RuntimeError('no gradients today')\n"
        "        return x.flatten(1)[:, :10]\n"
    )
    plan = toml(tmp_path / "plan.toml", targets=[{"name": "fragile", "make": "fragile.py:Fragile"}])
    done = command("run", plan, "--out", tmp_path / "out", "--no-report")
    assert done.returncode == 1, done.stderr
    rows = stored(tmp_path / "out").values()
    statuses = [{row["status"] for row in cell} for cell in rows]
    assert (
        sum("error" in found for found in statuses) == 2
        and sum("robust" in found or "broken" in found for found in statuses) == 2
    )
    notes = {row["note"] for cell in rows for row in cell if row["status"] == "error"}
    assert notes == {"RuntimeError: no gradients today"}
    assert "no gradients today" in next((tmp_path / "out").rglob("traceback-*")).read_text()
    assert "tracebacks: " in done.stderr


def test_a_chunk_that_kills_the_process_twice_becomes_an_error(tmp_path: Path) -> None:
    (tmp_path / "deadly.py").write_text(
        "import os, signal, torch\n"
        "class Deadly(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        if x.requires_grad:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return x.flatten(1)[:, :10]\n"
    )
    plan = toml(
        tmp_path / "plan.toml",
        targets=[{"name": "deadly", "make": "deadly.py:Deadly"}],
        threats=[{"norm": "linf", "eps": 0.1}],
        chunk=24,
        probes=0,  # they would be killed too
    )
    arguments = ("run", plan, "--out", tmp_path / "out", "--no-report")
    runs = [command(*arguments) for _ in range(3)]
    assert [run.returncode for run in runs] == [-9, -9, 1]
    assert "killed twice" in runs[-1].stderr and "tracebacks" not in runs[-1].stderr  # there are none
    rows = stored(tmp_path / "out").values()
    assert {row["status"] for cell in rows for row in cell} >= {"error"}
    assert any("killed twice" in row["note"] for cell in rows for row in cell)


def test_another_torch_inside_an_unfinished_cell_is_an_error(tmp_path: Path) -> None:
    robplug.evaluate(PLAN, out=tmp_path)
    path = next((tmp_path / "cells").iterdir()) / "cell.json"
    record = json.loads(path.read_text())
    record.update(state="unfinished", torch="1.0", chunks=record["chunks"][:1])
    path.write_text(json.dumps(record))
    with pytest.raises(StoreError, match=r"begun with torch 1\.0 and would go on with"):
        robplug.evaluate(PLAN, out=tmp_path)


def test_errors_of_a_plan_come_before_anything_runs(tmp_path: Path) -> None:
    done = command("run", toml(tmp_path / "p.toml", attacks=[{"name": "robplug/pdg"}]), "--out", tmp_path / "out")
    assert done.returncode == 2 and "did you mean robplug/pgd" in done.stderr
    assert not (tmp_path / "out" / "cells").exists() or not list((tmp_path / "out" / "cells").iterdir())
    with pytest.raises(PlanError, match=r"a file gone\.py"):
        robplug.evaluate({**PLAN, "targets": [{"name": "x", "make": "gone.py:net"}]}, out=tmp_path / "a")
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(os.urandom(64))
    bad = {"name": "x", "make": "robplug/digits-cnn", "weights": str(weights)}
    with pytest.raises(PlanError, match="weights that load without unpickling"):
        robplug.evaluate({**PLAN, "targets": [bad]}, out=tmp_path / "a")


def test_a_plan_that_does_the_same_twice_is_refused(tmp_path: Path) -> None:
    twice = [{"name": "a", "make": "robplug/digits-standard"}, {"name": "b", "make": "robplug/digits-standard"}]
    with pytest.raises(PlanError, match="'a: robplug/pgd' and 'b: robplug/pgd' are the same model"):
        robplug.evaluate({**PLAN, "targets": twice}, out=tmp_path)


def test_dry_run_prints_cells_and_work(tmp_path: Path) -> None:
    plan = toml(tmp_path / "plan.toml")
    done = command("run", plan, "--out", tmp_path / "out", "--dry-run", env={**os.environ, "COLUMNS": "160"})
    assert done.returncode == 0 and "4 cells" in done.stdout and not (tmp_path / "out").exists()
    robplug.evaluate(plan, out=tmp_path / "out")
    rows = outlook(plan, registry(), tmp_path / "out")
    assert [row.done for row in rows] == [24] * 4 and [row.forwards for row in rows] == [0] * 4
    # of an attack whose work nobody can tell, what is done is done as well
    threats = [{"norm": "linf", "eps": [0.1]}]
    plan = toml(tmp_path / "other.toml", attacks=[{"name": "torchattacks/ffgsm"}], threats=threats)
    assert [row.forwards for row in outlook(plan, registry(), tmp_path / "out")] == [None]
    robplug.evaluate(plan, out=tmp_path / "out")
    assert [row.forwards for row in outlook(plan, registry(), tmp_path / "out")] == [0]


def test_a_parameter_of_another_type_is_shown_beside_the_default(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"robplug/pgd: \{'steps': 'many'\}: .*; by default \{'steps': 20\}"):
        robplug.evaluate({**PLAN, "attacks": [{"name": "robplug/pgd", "steps": "many"}]}, out=tmp_path)


def test_targeted_goals_are_wrong_classes_and_depend_on_the_sample_alone(tmp_path: Path) -> None:
    for goal in ("random", "next", "least-likely"):
        plan = {**PLAN, "threats": [{"norm": "linf", "eps": 0.3, "targeted": True, "goal": goal}]}
        rows = robplug.evaluate(plan, out=tmp_path / goal).rows()
        assert all(row["y_goal"] not in (row["y"], -1) and 0 <= row["y_goal"] < 10 for row in rows)
        assert {row["status"] for row in rows} >= {"broken"}
        assert all(row["prediction_adv"] == row["y_goal"] for row in rows if row["status"] == "broken")
        if goal == "next":
            assert all(row["y_goal"] == (row["y"] + 1) % 10 for row in rows)
    few = {**PLAN, "datasets": [{"name": "digits", "samples": 7}], "chunk": 2}
    few["threats"] = [{"norm": "linf", "eps": 0.3, "targeted": True}]
    goals = {row["sample"]: row["y_goal"] for row in robplug.evaluate(few, out=tmp_path / "few").rows()}
    many = {row["sample"]: row["y_goal"] for row in json.loads(json.dumps(_rows(tmp_path / "random")))}
    assert all(many[sample] == goal for sample, goal in goals.items())


def _rows(path: Path) -> list[dict[str, Any]]:
    return [row for cell in stored(path).values() for row in cell]


def test_the_key_follows_the_file_of_the_model_and_its_parameters(tmp_path: Path) -> None:
    """A helper function beside the class, or another parameter, is another model with equal weights."""
    code = (
        "import torch\n"
        "def squeeze(x):\n    return x\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self, gain=1.0):\n        super().__init__(); self.gain = gain\n"
        "    def forward(self, x):\n        return self.gain * squeeze(x).flatten(1)[:, :10]\n"
    )
    keys = set()
    for name, text, params in (
        ("a", code, {}),
        ("b", code.replace("return x\n", "return x / 2\n"), {}),
        ("c", code, {"gain": 2.0}),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "net.py").write_text(text)
        lines = [f"{key} = {value}" for key, value in params.items()]
        target = {"name": "net", "make": "net.py:Net"}
        path = toml(folder / "plan.toml", targets=[target])
        if lines:
            path.write_text(
                path.read_text().replace('make = "net.py:Net"', 'make = "net.py:Net"\nparams = { gain = 2.0 }')
            )
        keys |= {row.key for row in outlook(path, registry())}
    assert len(keys) == 3 * 4


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("raise ValueError('no luck')", r"ValueError: no luck \(net\.py, line 1\)"),
        ("import nonexistent_library", "ModuleNotFoundError"),
        ("def Net(:", "SyntaxError"),
        ("def Net(size):\n    pass", "TypeError.*size"),
        (
            "import torch\ndef Net():\n    return torch.nn.Conv2d(3, 10, 3)",
            r"does not take samples of shape \(1, 8, 8\)",
        ),
        (
            "import torch\ndef Net():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))",
            "has 2 classes",
        ),
        ("def Net():\n    return 3", "a model of one of the classes"),
    ],
)
def test_a_model_file_that_fails_is_one_clear_error(tmp_path: Path, code: str, text: str) -> None:
    (tmp_path / "net.py").write_text(code)
    plan = toml(tmp_path / "plan.toml", targets=[{"name": "mine", "make": "net.py:Net"}])
    with pytest.raises(PlanError, match=text) as caught:
        robplug.evaluate(plan, out=tmp_path / "out")
    assert "target mine" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_how_the_path_of_a_plan_is_written_changes_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.py").write_text(
        "from torch import nn\n\nclass Net(nn.Sequential):\n    def __init__(self):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    plan = toml(tmp_path / "plan.toml", targets=[{"name": "mine", "make": "model.py:Net"}])
    absolute = [row.key for row in outlook(plan, registry())]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "modules", {k: v for k, v in sys.modules.items() if not k.startswith("robplug_user_")})
    assert [row.key for row in outlook(Path("plan.toml"), registry())] == absolute

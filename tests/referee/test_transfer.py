"""Attacks made on one model and judged on others: rows, matrix, resume."""

from __future__ import annotations

import csv
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

import robplug
from robplug import data
from robplug.errors import PlanError, StoreError
from robplug.plugins import registry
from robplug.referee.guard import Outcome
from robplug.referee.kept import found_elsewhere, keep_samples
from robplug.referee.outlook import outlook
from robplug.referee.results import Results
from robplug.referee.store import Store
from robplug.referee.sweeps import sweeps
from robplug.referee.verify import Batch, Verdicts
from robplug.types import Perturbed

PLAN: dict[str, Any] = {
    "probes": 0,
    "targets": [
        {"name": "plain", "make": "robplug/digits-standard"},
        {"name": "hardened", "make": "robplug/digits-at"},
        {"name": "both", "make": "robplug/ensemble", "of": ["plain", "hardened"]},
    ],
    "datasets": [{"name": "digits", "samples": 168}],
    "threats": [{"norm": "linf", "eps": 0.2}],
    "attacks": [{"name": "robplug/pgd", "early_stop": False, "sweep": {"steps": [2, 6]}}],
    "transfer": [{"sources": ["plain", "both"], "victims": ["plain", "hardened"]}],
    "chunk": 60,
}
CODE = [sys.executable, "-c", "from robplug.cli import main; main()"]


def cells(path: Path) -> dict[tuple[str, str, int], Path]:
    """Returns the directories of the cells by source, victim and steps."""
    found = {}
    for folder in (path / "cells").iterdir():
        record = json.loads((folder / "cell.json").read_text())
        found[record["source"] or record["target"], record["target"], record["params_passed"]["steps"]] = folder
    return found


def rows(path: Path) -> list[dict[str, Any]]:
    keys = ("target", "source", "label", "sample", "y", "prediction", "prediction_adv", "status", "distance")
    return sorted(({key: str(row[key]) for key in keys} for row in Results(path).rows()), key=str)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("transfer")
    robplug.evaluate(PLAN, out=path)
    yield path


def test_sources_are_attacked_and_victims_judge(run: Path) -> None:
    pairs = [("plain", "plain"), ("plain", "hardened"), ("both", "both"), ("both", "plain"), ("both", "hardened")]
    assert set(cells(run)) == {(*pair, steps) for pair in pairs for steps in (2, 6)}
    spent = {place: json.loads((cell / "cell.json").read_text())["chunks"] for place, cell in cells(run).items()}
    for (source, victim, _), chunks in spent.items():
        assert (sum(chunk["forwards"] for chunk in chunks) > 0) == (source == victim)


def test_the_matrix_is_what_the_stored_samples_do(run: Path) -> None:
    """Recomputed with the models themselves, from the files."""
    data = robplug.dataset("digits", split="test").head(168)
    nets = {"plain": robplug.target("robplug/digits-standard"), "hardened": robplug.target("robplug/digits-at")}
    nets["both"] = robplug.target([nets["plain"], nets["hardened"]])
    common = torch.stack([net.predict(data.x) == data.y for net in nets.values()]).all(0)
    assert 0 < int(common.sum()) < 168
    (matrix,) = Results(run).summary().matrices
    assert matrix.common == int(common.sum()) and matrix.samples == 168
    steps_of = {attack.number: int(attack.at or 0) for attack in Results(run).summary().attacks}
    assert len(matrix.entries) == 10
    for entry in matrix.entries:
        folder = cells(run)[entry.source, entry.source, steps_of[entry.attack]]
        stored = [load_file(file) for file in sorted(folder.glob("adversarials-*"))]
        sample = torch.cat([chunk["sample"] for chunk in stored])
        x_adv = torch.cat([chunk["x_adv"] for chunk in stored])
        assert bool(((x_adv - data.x[sample]).abs() <= 0.2 + 1e-6).all())
        broken = (nets[entry.victim].predict(x_adv) != data.y[sample]) & common[sample]
        assert (entry.broken, entry.counted, entry.unresolved) == (int(broken.sum()), matrix.common, 0)
        assert entry.white_box == (entry.victim == entry.source or entry.source == "both")
    shares = {(one.source, one.victim): one.broken for one in matrix.entries if steps_of[one.attack] == 6}
    assert shares["plain", "plain"] > shares["plain", "hardened"] > 0


def test_pairs_count_what_both_classify_correctly(run: Path, tmp_path: Path) -> None:
    transfer = [{**PLAN["transfer"][0], "count": "pairs"}]
    (matrix,) = robplug.evaluate({**PLAN, "transfer": transfer}, out=tmp_path).summary().matrices
    data = robplug.dataset("digits", split="test").head(168)
    plain, hardened = (robplug.target(f"robplug/digits-{name}") for name in ("standard", "at"))
    right = {"plain": plain.predict(data.x) == data.y, "hardened": hardened.predict(data.x) == data.y}
    for entry in matrix.entries:
        if entry.source == "plain":
            assert entry.counted == int((right["plain"] & right[entry.victim]).sum())
    assert any(entry.counted > matrix.common for entry in matrix.entries)


def test_samples_that_the_source_gets_wrong_are_unattacked(run: Path) -> None:
    found = {(row["source"] or row["target"], row["target"], row["sample"]): row for row in Results(run).rows()}
    for (source, victim, sample), row in found.items():
        wrong = found[source, source, sample]["status"] == "misclassified"
        if row["prediction"] != row["y"]:
            assert row["status"] == "misclassified"
        else:
            assert (row["status"] == "unattacked") == (wrong and source != victim)
    assert any(row["status"] == "unattacked" for row in found.values())


def test_a_victim_added_later_costs_forwards_only(run: Path, tmp_path: Path) -> None:
    alone = {**PLAN, "targets": PLAN["targets"][:1], "transfer": [{"sources": ["plain"], "victims": ["plain"]}]}
    robplug.evaluate(alone, out=tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*-0*")}
    more = {**PLAN, "targets": PLAN["targets"][:2], "transfer": [{"sources": ["plain"], "victims": ["hardened"]}]}
    robplug.evaluate(more, out=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    expected = [row for row in rows(run) if "plain" in (row["source"], row["target"]) and row["source"] != "both"]
    assert [row for row in rows(tmp_path) if row["target"] != "plain"] == [
        row for row in expected if row["target"] == "hardened"
    ]


def test_a_run_without_transfer_is_attacked_again_for_its_samples(run: Path, tmp_path: Path) -> None:
    """It has kept a few examples alone."""
    before = {**PLAN, "targets": PLAN["targets"][:1], "keep": "none"}
    del before["transfer"]
    robplug.evaluate(before, out=tmp_path)
    assert not list(tmp_path.rglob("adversarials-*"))
    robplug.evaluate(PLAN, out=tmp_path)
    assert rows(tmp_path) == rows(run)


def test_a_killed_run_resumed_equals_one_that_was_not(run: Path, tmp_path: Path) -> None:
    toml = tmp_path / "plan.toml"
    lines = ["chunk = 60"]
    for key, entries in PLAN.items():
        for entry in entries if isinstance(entries, list) else ():
            values = {name: json.dumps(value).replace('{"steps":', "{steps =") for name, value in entry.items()}
            lines += [f"[[{key}]]", *(f"{name} = {value}" for name, value in values.items())]
    toml.write_text("\n".join(lines))
    out, draw = tmp_path / "killed", random.Random(1)
    words = [*CODE, "run", toml, "--out", out, "--no-report"]
    for _ in range(2):
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        enough = len(list(out.rglob("samples-*"))) + draw.randint(3, 8)
        while len(list(out.rglob("samples-*"))) < enough:
            assert process.poll() is None
            time.sleep(draw.random() / 100)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert rows(out) == rows(run)
    assert "success on digits" in done.stdout and "white box" in done.stdout


def test_stored_samples_are_measured_again(run: Path, tmp_path: Path) -> None:
    """Samples changed on disk are judged as what they are: outside of the ball."""
    source = {**PLAN, "targets": PLAN["targets"][:1], "transfer": [{"sources": ["plain"], "victims": ["plain"]}]}
    robplug.evaluate(source, out=tmp_path)
    for folder in cells(tmp_path).values():
        for file in folder.glob("adversarials-*"):
            tensors = load_file(file)
            tensors["x_adv"] = 1 - tensors["x"]
            save_file(tensors, file)
    robplug.evaluate({**PLAN, "transfer": [{"sources": ["plain"], "victims": ["hardened", "both"]}]}, out=tmp_path)
    judged = [row for row in Results(tmp_path).rows() if row["source"] == "plain"]
    assert {row["status"] for row in judged} <= {"invalid", "misclassified", "unattacked"}
    (matrix,) = Results(tmp_path).summary().matrices
    elsewhere = [entry for entry in matrix.entries if entry.victim != "plain"]
    assert all(entry.broken == 0 and entry.unresolved == entry.counted for entry in elsewhere)


@pytest.mark.parametrize("cut", [True, False])
def test_damaged_samples_are_an_error_that_says_what_to_remove(tmp_path: Path, cut: bool) -> None:
    source = {**PLAN, "targets": PLAN["targets"][:1], "transfer": [{"sources": ["plain"], "victims": ["plain"]}]}
    robplug.evaluate(source, out=tmp_path)
    file = next(iter(tmp_path.rglob("adversarials-00001*")))
    file.write_bytes(file.read_bytes()[:50] if cut else save({"sample": torch.arange(3)}))
    with pytest.raises(StoreError, match=r"adversarials-00001.*damaged.*remove"):
        robplug.evaluate(PLAN, out=tmp_path)


def test_an_attack_that_fails_leaves_the_matrix_unresolved(tmp_path: Path) -> None:
    attacks = [{"name": "robplug/pgd", "timeout_s": 1e-9, "sweep": {"steps": [2, 6]}}]
    (matrix,) = robplug.evaluate({**PLAN, "attacks": attacks}, out=tmp_path).summary().matrices
    assert matrix.common > 0
    assert all(entry.unresolved == entry.counted == matrix.common for entry in matrix.entries)


def test_no_common_sample_is_a_clear_end(tmp_path: Path) -> None:
    untrained = {"name": "untrained", "make": "robplug/digits-cnn"}
    plan = {
        **PLAN,
        "targets": [*PLAN["targets"], untrained],
        "datasets": [{"name": "digits", "samples": 3}],
        "transfer": [{"sources": ["plain"], "victims": ["untrained"]}, *PLAN["transfer"]],
    }
    results = robplug.evaluate(plan, out=tmp_path)
    first = results.summary().matrices[0]
    assert first.common == 0 and all(entry.success.value is None for entry in first.entries)
    assert "no share can be given" in str(results.table()) and "There is none" in results.report().read_text()


def test_leave_one_out_makes_an_ensemble_of_all_others(tmp_path: Path) -> None:
    third = {"name": "third", "make": "robplug/digits-cnn"}
    victims = ["plain", "hardened", "third"]
    transfer = [{"sources": "leave-one-out", "victims": victims, "count": "pairs"}]
    plan = {**PLAN, "targets": [*PLAN["targets"][:2], third], "transfer": transfer}
    (matrix,) = robplug.evaluate(plan, out=tmp_path).summary().matrices
    assert matrix.sources == ("all but plain", "all but hardened", "all but third")
    for entry in matrix.entries:
        assert entry.white_box == (entry.source != f"all but {entry.victim}")
    others = [{"name": "rest", "make": "robplug/ensemble", "of": victims[1:]}]
    own = {**plan, "targets": [*plan["targets"], *others], "transfer": [{"sources": ["rest"], "victims": victims}]}
    by_hand = robplug.evaluate(own, out=tmp_path / "own").rows()
    theirs = {(row["label"], row["target"], row["sample"]): row for row in by_hand if row["source"] == "rest"}
    mine = [row for row in Results(tmp_path).rows() if row["source"] == "all but plain"]
    assert mine
    for row in mine:
        assert theirs[row["label"], row["target"], row["sample"]]["prediction_adv"] == row["prediction_adv"]


def test_goals_are_those_of_the_source(tmp_path: Path) -> None:
    threats = [{"norm": "linf", "eps": 0.2, "targeted": True, "goal": "least-likely"}]
    found = robplug.evaluate({**PLAN, "threats": threats}, out=tmp_path).rows()
    goal = {
        (row["label"], row["sample"]): row["y_goal"] for row in found if row["target"] == "plain" and not row["source"]
    }
    judged = [row for row in found if row["source"] == "plain"]
    assert judged and all(row["y_goal"] == goal[row["label"], row["sample"]] for row in judged)
    for row in judged:
        if row["status"] in ("broken", "robust"):
            assert (row["status"] == "broken") == (row["prediction_adv"] == row["y_goal"])


def test_a_minimal_attack_is_read_at_the_radius(tmp_path: Path) -> None:
    threats, attacks = [{"norm": "l2", "eps": [0.5, 1.5]}], [{"name": "torchattacks/deep-fool", "overshoot": 1.0}]
    results = robplug.evaluate({**PLAN, "threats": threats, "attacks": attacks}, out=tmp_path)
    found = {(row["source"] or row["target"], row["target"], row["sample"]): row for row in results.rows()}
    wrong = {key[2] for key, row in found.items() if row["prediction"] != row["y"]}
    common = [sample for sample in range(168) if sample not in wrong]
    few, many = results.summary().matrices
    assert (few.eps, many.eps, few.common) == (0.5, 1.5, len(common))
    for matrix in (few, many):
        for entry in matrix.entries:
            judged = [found[entry.source, entry.victim, sample] for sample in common]
            near = [row for row in judged if row["status"] == "broken" and row["distance"] <= (matrix.eps or 0) + 1e-6]
            assert entry.broken == len(near)
    assert sum(entry.broken for entry in few.entries) < sum(entry.broken for entry in many.entries)


def test_witnesses_and_single_samples_come_back(tmp_path: Path) -> None:
    """What norms need beside the samples is kept, in the order in which the judge wants it."""
    store = Store(tmp_path).cell("ab" * 32)
    store.write_record({})
    x, y = torch.rand(5, 1, 3, 3), torch.tensor([0, 1, 2, 0, 1])
    prediction = torch.tensor([0, 9, 2, 0, 1])
    batch = Batch([20, 21, 22, 23, 24], x, y, None, prediction)
    x_adv, witness = torch.rand(4, 1, 3, 3), torch.rand(4, 2, 3, 3)
    keep_samples("all", 3, batch, Verdicts([]), Outcome(perturbed=Perturbed(x_adv, witness)), store)
    judge = Batch([20, 21, 22, 23, 24], x, y, None, torch.tensor([0, 1, 9, 0, 1]))
    kept = [store.tensors("adversarials", 3, ("sample", "x", "x_adv"))]
    seen, outcome = found_elsewhere(judge, kept, (0.0, 1.0), None)
    assert seen.attacked.tolist() == [True, False, False, True, True]
    assert outcome.perturbed is not None
    assert torch.equal(outcome.perturbed.x_adv, x_adv[[0, 2, 3]])
    assert outcome.perturbed.witness is not None and torch.equal(outcome.perturbed.witness, witness[[0, 2, 3]])


def test_the_outlook_knows_what_judging_costs(tmp_path: Path) -> None:
    found = outlook(PLAN, registry(), tmp_path)  # type: ignore[arg-type]
    assert [(row.forwards, row.backwards) for row in found if row.cell.source is not None] == [(168, 0)] * 6
    assert [row.columns()[0] for row in found][:3] == ["plain", "plain \u2192 hardened", "plain"]


def test_a_victim_that_takes_other_images_is_refused(tmp_path: Path) -> None:
    other = {"name": "other", "make": "robplug/resnet20"}
    plan = {
        **PLAN,
        "targets": [*PLAN["targets"], other],
        "transfer": [{"sources": ["plain"], "victims": ["other", "both"]}],
    }
    with pytest.raises(PlanError, match=r"target other.*does not take samples of shape"):
        robplug.evaluate(plan, out=tmp_path)


def test_sweeps_become_curves_and_tables(run: Path) -> None:
    summary = Results(run).summary()
    assert [attack.name for attack in summary.attacks] == ["robplug/pgd steps=2", "robplug/pgd steps=6"]
    assert [(attack.swept, attack.at, attack.family) for attack in summary.attacks] == [
        ("steps", 2, 1),
        ("steps", 6, 1),
    ]
    (sweep,) = sweeps(summary)
    assert sweep.name == "steps" and [value for value, _, _ in sweep.points] == [2, 6]
    paths = Results(run).export()
    with next(path for path in paths if path.name == "transfer.csv").open() as handle:
        lines = list(csv.DictReader(handle))
    entries = {(one.source, one.victim, one.attack): one for one in summary.matrices[0].entries}
    assert len(lines) == len(entries) == 10
    for line in lines:
        number = 1 if line["attack"].endswith("2") else 2
        assert int(line["broken"]) == entries[line["source"], line["victim"], number].broken
    page = Results(run).report().read_text()
    assert '<section id="transfer">' in page and "success against steps" in page
    assert page.count('class="n white"') == sum(one.white_box for one in summary.matrices[0].entries)


def test_a_matrix_that_is_under_way_counts_what_every_model_has_seen(run: Path, tmp_path: Path) -> None:
    whole = Results(run).summary().matrices[0]
    shutil.copytree(run, tmp_path / "part")
    for folder in (tmp_path / "part" / "cells").iterdir():  # the victim has judged two chunks of three
        record = json.loads((folder / "cell.json").read_text())
        if record["target"] == "hardened":
            chunks = record["chunks"][:2]
            (folder / "cell.json").write_text(json.dumps({**record, "state": "unfinished", "chunks": chunks}))
    results = Results(tmp_path / "part")
    (part,) = results.summary().matrices
    assert 0 < part.common < whole.common and all(entry.unresolved == 0 for entry in part.entries)
    assert results.summary().incomplete == 4 and "4 cells incomplete" in str(results.table())


def test_samples_that_are_no_images_have_no_rows_and_columns_to_permute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = data.digits
    monkeypatch.setattr(data, "digits", lambda **params: replace(images(**params), x=images(**params).x.flatten(1)))
    (tmp_path / "net.py").write_text("import torch\n\ndef net(seed):\n    return torch.nn.Linear(64, 10)\n")
    targets = [{"name": name, "make": "net.py:net", "params": {"seed": place}} for place, name in enumerate("ab")]
    transfer = [{"sources": ["a"], "victims": ["b"], "permuted": True}]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlanError, match=r"permuted.*rows and columns"):
        robplug.evaluate({**PLAN, "targets": targets, "transfer": transfer}, out=tmp_path / "run")
    assert not list(tmp_path.glob("run/cells/*"))

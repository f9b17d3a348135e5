"""Runs with targets for segmentation and detection: figures, resume, transfer, old directories, pages."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import robplug
from robplug.errors import PlanError
from robplug.plugins import registry
from robplug.referee.kept import found_elsewhere
from robplug.referee.overlays import SHARE, colour, drawn_over
from robplug.referee.precision import mean_average_precision
from robplug.referee.results import Results
from robplug.referee.run import PERMUTING
from robplug.referee.verify import Batch
from robplug.rng import Rng
from robplug.targets import Target
from robplug.tasks import Segmentation

SIZE, SAMPLES, CLASSES = 32, 7, 4
SHAPES = {"size": SIZE, "contrast": 0.3}
HUES = """
import torch
from robplug.vision.shapes import HUES

class Hues(torch.nn.Module):
    '''Classes by the product of a pixel's difference to grey with the classes' own; half of it is background.'''

    def __init__(self):
        super().__init__()
        self.register_buffer("hues", torch.tensor([[0, 0, 0], *list(HUES.values())[:3]]).float()[:, :, None, None])

    def forward(self, x):
        logits = torch.nn.functional.conv2d(x - 0.5, self.hues)
        return logits + torch.tensor([0.45, 0, 0, 0]).view(4, 1, 1)
"""
KILLED = """
import json, os, signal, sys
from robplug.plugins import registry
from robplug.referee.run import run_plan

class Progress:
    left = 5
    def begin(self, samples): ...
    def advance(self, label, samples, done_before):
        Progress.left -= 1
        if not Progress.left:
            os.kill(os.getpid(), signal.SIGKILL)

run_plan(json.loads(sys.argv[1]), registry(), sys.argv[2], Progress())
"""


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A network in closed form for pixels, and a detector that is trained for two seconds."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "net.py").write_text(HUES)
    torch.manual_seed(0)
    detector = registry().named_target("robplug/ssd-residual", width=8)
    data = robplug.dataset("shapes-boxes", split="train", samples=96, **SHAPES)
    robplug.train(detector, data, epochs=8, batch_size=8, optimizer="adam", lr=0.01, device="cpu")
    save_file(detector.state_dict(), folder / "boxes.safetensors")
    boxes = {"make": "robplug/ssd-residual", "params": {"width": 8}, "weights": str(folder / "boxes.safetensors")}
    return {
        "targets": [{"name": "pixels", "make": f"{folder}/net.py:Hues"}, {"name": "boxes", **boxes}],
        "datasets": [{"name": "shapes", "samples": SAMPLES, "params": SHAPES}],
        "threats": [{"norm": "linf", "eps": 0.2}],
        "attacks": [{"name": "robplug/pgd", "steps": 2}],
        "transfer": [{"sources": ["pixels", "boxes"], "victims": ["pixels", "boxes"], "permuted": True}],
        "chunk": 3,
        "probes": 0,
        "device": "cpu",
    }


@pytest.fixture(scope="module")
def run(plan: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return robplug.evaluate(plan, out=tmp_path_factory.mktemp("run") / "out").path


def target(plan: dict[str, Any], name: str) -> Target:
    if name == "pixels":
        scope: dict[str, Any] = {}
        exec(HUES, scope)  # noqa: S102
        return robplug.target(scope["Hues"](), task="segmentation", classes=CLASSES)
    module = registry().named_target("robplug/ssd-residual", width=8)
    module.load_state_dict(load_file(plan["targets"][1]["weights"]))
    return robplug.target(module.eval(), task="detection", classes=CLASSES)


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads((cell / "cell.json").read_text()) for cell in sorted((path / "cells").iterdir())]


def adversarials(path: Path, name: str) -> Tensor:
    """Returns what was found on a target, (SAMPLES, 3, SIZE, SIZE)."""
    (folder,) = (f for f in (path / "cells").iterdir() if next(f.glob("adversarials-*"), None) and _named(f, name))
    parts = [load_file(file) for file in sorted(folder.glob("adversarials-*"))]
    assert torch.cat([part["sample"] for part in parts]).tolist() == list(range(SAMPLES))
    return torch.cat([part["x_adv"] for part in parts])


def _named(folder: Path, name: str) -> bool:
    return bool(json.loads((folder / "cell.json").read_text())["target"] == name)


def rows_of(boxes: Tensor) -> list[Any]:
    return [rows[rows[:, -1] != -1].double().numpy() for rows in boxes]


def entry(path: Path, source: str, victim: str) -> Any:
    (matrix,) = Results(path).summary().matrices
    return next(one for one in matrix.entries if (one.source, one.victim) == (source, victim))


def mean_iou(answer: Tensor, y: Tensor, classes: range) -> float:
    ious = [
        float(((answer == k) & (y == k)).sum() / ((answer == k) | (y == k)).sum())
        for k in classes
        if ((answer == k) | (y == k)).any()
    ]
    return sum(ious) / len(ious)


@pytest.mark.parametrize("source", ["pixels", "boxes"])
def test_mean_iou_from_rows_is_that_over_all_pixels(plan: dict[str, Any], run: Path, source: str) -> None:
    data = robplug.dataset("shapes", samples=SAMPLES, **SHAPES)
    images = (data.x, adversarials(run, source))
    answers = [target(plan, "pixels").predict(x) for x in images]
    quality = entry(run, source, "pixels").quality
    for place, answer in enumerate(answers):
        assert quality["foreground mIoU"][place] == pytest.approx(mean_iou(answer, data.y, range(1, CLASSES)))
        assert quality["mIoU"][place] == pytest.approx(mean_iou(answer, data.y, range(CLASSES)))
        assert quality["pixel accuracy"][place] == pytest.approx(float((answer == data.y).double().mean()))
    assert quality["foreground mIoU"][0] > 0.95 and (source == "boxes" or quality["foreground mIoU"][1] < 0.3)


@pytest.mark.parametrize("source", ["pixels", "boxes"])
def test_mean_average_precision_is_that_of_the_answers(plan: dict[str, Any], run: Path, source: str) -> None:
    data = robplug.dataset("shapes-boxes", samples=SAMPLES, **SHAPES)
    quality, truth = entry(run, source, "boxes").quality, rows_of(data.y)
    for place, x in enumerate((data.x, adversarials(run, source))):
        known = mean_average_precision(truth, rows_of(target(plan, "boxes").detections(x)))
        assert {name: values[place] for name, values in quality.items()} == pytest.approx(known)
    assert quality["mAP 50"][0] > 0.3 and (source == "pixels" or quality["mAP 50"][1] < 0.5 * quality["mAP 50"][0])


def test_a_run_killed_between_chunks_goes_on_to_the_same_rows_and_figures(
    plan: dict[str, Any], run: Path, tmp_path: Path
) -> None:
    words = [sys.executable, "-c", KILLED, json.dumps(plan), str(tmp_path)]
    assert subprocess.run(words, check=False).returncode == -signal.SIGKILL
    assert len(list(tmp_path.rglob("samples-*"))) == 5
    robplug.evaluate(plan, out=tmp_path)
    key = ("target", "source", "sample")
    one, other = (sorted(Results(path).rows(), key=lambda row: [str(row[k]) for k in key]) for path in (run, tmp_path))
    assert str(one) == str(other) and len(one) == 8 * SAMPLES  # nan equals nan as a text
    assert Results(run).summary().matrices == Results(tmp_path).summary().matrices
    figures = [[record.get("quality") for record in records(path)] for path in (run, tmp_path)]
    assert figures[0] == figures[1] and sum(one is not None for one in figures[0]) == 4


def test_the_control_has_the_same_values_in_another_order(plan: dict[str, Any], run: Path) -> None:
    """The referee's cell of the permuted perturbation, made again by hand."""
    data = robplug.dataset("shapes", samples=SAMPLES, **SHAPES)
    change = adversarials(run, "pixels").double() - data.x.double()
    rng = Rng(0, range(SAMPLES), restart=PERMUTING)
    rows, columns = (rng.uniform((SIZE,), like=change).argsort(1) for _ in range(2))
    x_adv = torch.stack(
        [x.double() + r[:, a][:, :, b] for x, r, a, b in zip(data.x, change, rows, columns, strict=True)]
    )
    answer = target(plan, "pixels").predict(x_adv.clamp(0, 1).float())
    after = entry(run, "pixels, permuted", "pixels").quality["foreground mIoU"][1]
    assert after == pytest.approx(mean_iou(answer, data.y, range(1, CLASSES)))


def batch(samples: int = 3) -> tuple[Batch, list[dict[str, Tensor]]]:
    """Returns a chunk of images, and what two sources have kept for them in other orders."""
    x, y = torch.rand(samples, 3, 5, 4), torch.ones(samples, 5, 4, dtype=torch.int64)
    kept = []
    for order in (torch.arange(samples), torch.arange(samples).flip(0)):
        x_adv = (x + 0.2 * torch.randn(x.shape)).clamp(0, 1)
        kept.append({"sample": 10 + order, "x": x[order], "x_adv": x_adv[order]})
    return Batch([10 + n for n in range(samples)], x, y, None, y.to(torch.int16), Segmentation(2)), kept


def test_perturbations_are_added_to_the_bit() -> None:
    one, kept = batch()
    _, outcome = found_elsewhere(one, kept, (0.0, 1.0), None)
    assert outcome.perturbed is not None
    for n in range(3):
        r1, r3 = (part["x_adv"][i].double() - part["x"][i].double() for part, i in zip(kept, (n, 2 - n), strict=True))
        expected = (one.x[n].double() + r1 + r3).clamp(0.0, 1.0).float()
        torch.testing.assert_close(outcome.perturbed.x_adv[n], expected, rtol=0, atol=6e-8)
        mine = (one.x[n].double() + (r1 + r3)).clamp(0.0, 1.0).float()
        assert torch.equal(outcome.perturbed.x_adv[n], mine)
    kept[1] = {name: tensor[:2] for name, tensor in kept[1].items()}  # the second source lacks sample 10
    left, outcome = found_elsewhere(one, kept, (0.0, 1.0), None)
    assert left.attacked.tolist() == [False, True, True]
    assert outcome.perturbed is not None and len(outcome.perturbed.x_adv) == 2


def test_a_permutation_moves_whole_rows_and_columns_and_belongs_to_the_sample() -> None:
    one, kept = batch()
    grey = one.x * 0 + 0.5
    for part in kept:
        part["x_adv"], part["x"] = 0.5 + 0.1 * (part["x_adv"] - part["x"]), torch.full_like(part["x"], 0.5)
    middle = Batch(one.ids, grey, one.y, None, one.answer, one.task)
    made = [
        found_elsewhere(middle, kept[:1], (0.0, 1.0), order)[1] for order in (None, Rng(0, one.ids), Rng(0, one.ids))
    ]
    plain, control, again = (outcome.perturbed.x_adv for outcome in made if outcome.perturbed is not None)
    assert torch.equal(control, again) and not torch.equal(control, plain)
    for n in range(3):
        for channel in range(3):
            values = [part[n, channel].flatten().sort().values for part in (plain, control)]
            torch.testing.assert_close(*values, rtol=0, atol=1e-7)
        as_rows = [
            {tuple(sorted(row)) for row in part[n, 0].double().round(decimals=5).tolist()} for part in (plain, control)
        ]
        assert as_rows[0] == as_rows[1]
    alone = Batch(one.ids[1:2], grey[1:2], one.y[1:2], None, one.answer[1:2], one.task)
    outcome = found_elsewhere(alone, kept[:1], (0.0, 1.0), Rng(0, one.ids[1:2]))[1]
    assert outcome.perturbed is not None and torch.equal(outcome.perturbed.x_adv[0], control[1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"threats": [{"norm": "linf", "eps": 0.1, "targeted": True}]}, "drop targeted, attacks of that task choose"),
        (
            {"attacks": [{"name": "robplug/cw"}], "threats": [{"norm": "l2", "eps": 1.0}]},
            "robplug/cw serves classification, and pixels is for segmentation; use an attack on that task: .*/fgsm",
        ),
        ({"datasets": [{"name": "digits", "samples": 3}]}, "digits with labels for segmentation"),
        (
            {"transfer": [{"sources": ["pixels", "boxes"], "victims": ["boxes"], "sums": [["pixels", "boxes"]]}]},
            "a sum of robplug/pgd leaves the ball of its threat; use an attack that looks for the smallest",
        ),
    ],
)
def test_plans_that_make_no_sense_are_refused(
    plan: dict[str, Any], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    targets = [{**plan["targets"][0], "task": "segmentation"}, plan["targets"][1]]
    with pytest.raises(PlanError, match=words):
        robplug.evaluate({**plan, "targets": targets, **changes}, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_from_before_there_were_scores_is_read(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "old")
    for file in (tmp_path / "old").rglob("samples-*"):
        pq.write_table(pq.read_table(file, partitioning=None).drop_columns(["scores"]), file)
    before, after = Results(run), Results(tmp_path / "old")
    assert [row["status"] for row in before.rows()] == [row["status"] for row in after.rows()]
    pixels = [cell for cell in after.summary().cells if after.summary().subjects[cell.subject].target == "pixels"]
    assert pixels and all(cell.quality == {} for cell in pixels) and "pixels" in str(after.table())


def test_table_report_and_files_show_the_figures(run: Path) -> None:
    results = Results(run)
    table, page = str(results.table()), results.report().read_text(encoding="utf-8")
    assert "foreground mIoU" in table and "mAP 50" in table
    assert "foreground mIoU" in page and "mAP 50" in page and page.count("data:image/png;base64,") >= 2 * 5
    files = {path.name: path.read_text() for path in results.export()}
    assert "foreground mIoU, after" in files["transfer.csv"] and "mAP 50, before" in files["transfer.csv"]


def test_answers_are_drawn_in_the_colours_of_their_classes() -> None:
    image = np.full((1, 6, 8), 0.2)
    labels = np.zeros((6, 8), dtype=np.float32)
    labels[2, 3], labels[5, 7] = 1, 3
    shown = drawn_over(image, labels)
    assert np.allclose(shown[:, 2, 3], 0.35 * 0.2 + 0.65 * colour(1)) and SHARE == 0.65
    assert np.allclose(shown[:, 5, 7], 0.35 * 0.2 + 0.65 * colour(3)) and np.allclose(shown[:, 0, 0], 0.2)
    boxes = np.array([[1, 1, 5, 4, 0.9, 2], [0, 0, 8, 6, 0.4, 1], [-1] * 6], dtype=np.float32)
    framed = drawn_over(np.repeat(image, 3, 0), boxes)
    changed = (framed != 0.2).any(0)
    frame = np.zeros((6, 8), dtype=bool)
    frame[1:4, 1:5] = True
    frame[2, 2:4] = False
    assert (changed == frame).all() and np.allclose(framed[:, 1, 1], colour(2))  # the unsure box is not drawn

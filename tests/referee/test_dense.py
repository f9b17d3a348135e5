"""Runs on pixels and boxes: what a row says, and what is left when attacks fail or a plan grows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import robplug
from robplug.data import Dataset
from robplug.errors import PlanError
from robplug.norms import LINF
from robplug.referee.guard import Assignment, run_guarded
from robplug.referee.precision import _rows, mean_average_precision
from robplug.rng import Rng
from robplug.targets import Target
from robplug.tasks import Detection
from robplug.types import Perturbed, ThreatModel
from robplug.vision import shapes
from robplug.vision.detector import AnchorDetector
from robplug.vision.nets import conv_block

PLAN: dict[str, Any] = {
    "probes": 0,
    "targets": [{"name": "boxes", "make": "robplug/ssd-plain", "params": {"width": 4}}],
    "datasets": [{"name": "shapes-boxes", "params": {"samples": 3, "size": 32}}],
    "threats": [{"norm": "linf", "eps": 0.01}],
    "attacks": [{"name": "robplug/pgd", "steps": 2}],
    "chunk": 2,
    "keep": "none",
}


def test_an_attack_on_a_detector_that_fails_leaves_rows_and_precision(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    results = robplug.evaluate({**PLAN, "timeout_s": 1e-9}, out=tmp_path)
    assert all("timeout" in row["note"] for row in results.rows()) and results.summary().finished
    before, after = results.summary().cells[0].quality["mAP 50"]
    assert before == after


@pytest.mark.parametrize("fails", [{"timeout_s": 1e-9}, {}])
def test_what_is_read_wrong_before_any_attack_is_misclassified_whatever_the_attack_does(
    tmp_path: Path, fails: dict[str, Any]
) -> None:
    blind = {"name": "blind", "make": "robplug/fcn-small"}  # untrained
    data = {"name": "shapes", "params": {"samples": 3, "size": 32}}
    summary = robplug.evaluate({**PLAN, "targets": [blind], "datasets": [data], **fails}, out=tmp_path).summary()
    assert summary.cells[0].misclassified == 3 and summary.cells[0].clean.value == 0
    assert summary.worst_cases[0].misclassified == 3 and summary.worst_cases[0].clean.value == 0
    assert bool(summary.cells[0].notes) is bool(fails)


def test_samples_without_any_box_are_refused_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shapes.shapes_boxes
    monkeypatch.setattr(shapes, "shapes_boxes", lambda **params: replace(full(**params), y=-torch.ones(3, 4, 5)))
    with pytest.raises(PlanError, match="at least one box"):
        robplug.evaluate(PLAN, out=tmp_path)
    assert not list(tmp_path.glob("cells/*"))


class Broken(AnchorDetector):
    """Gives nan for every image in which the first value is large, as logits or as answers."""

    def __init__(self, answers: bool) -> None:
        super().__init__(conv_block(3, 4, stride=4), 4, 4, (12.0,))
        self.answers = answers

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, offsets = super().forward(x)
        lost = (x[:, 0, 0, 0] > 0.5) & (not self.answers)
        return logits.masked_fill(lost[:, None, None], torch.nan), offsets

    def detections(self, x: torch.Tensor) -> torch.Tensor:
        answers = super().detections(x)
        answers[(x[:, 0, 0, 0] > 0.5) & self.answers, 0] = torch.nan
        return answers


@pytest.mark.parametrize("answers", [False, True])
def test_a_detector_that_gives_no_number_is_not_broken_but_answers_nothing(answers: bool) -> None:
    module = Broken(answers).eval()
    x, y = torch.zeros(2, 3, 32, 32), torch.tensor([[[1.0, 1, 12, 12, 1]]] * 2)
    x[1] = 1.0
    found = robplug.target(module, task="detection").detections(x)
    assert Detection(4).code(found, y).tolist() == [0, -1]
    pytest.importorskip("pycocotools")
    assert mean_average_precision([_rows(one) for one in y], [_rows(one) for one in found])["mAP"] >= 0


def test_labels_that_a_detector_gives_are_labels_that_a_task_takes() -> None:
    answer = torch.tensor([[[0.0, 2, 0, 9, 0.9, 1], [1, 2, 5, 9, 0.9, 2], [1, 2, 5, 9, 0.1, 1]]])
    labels = Detection(4).labels(answer)
    Detection(4).check(labels, torch.zeros(1, 3, 16, 16))
    assert labels[..., 4].tolist() == [[-1, 2, -1]]


def test_a_second_data_set_of_the_same_name_has_to_fit_the_model_too(tmp_path: Path) -> None:
    data = [{"name": "shapes", "params": {"samples": 2, "size": 32, "classes": classes}} for classes in (4, 7)]
    with pytest.raises(PlanError, match="has 4 classes"):
        robplug.evaluate({**PLAN, "targets": [{"name": "robplug/fcn-small"}], "datasets": data}, out=tmp_path)


def test_a_victim_of_another_task_has_no_goals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = shapes.shapes
    monkeypatch.setattr(shapes, "shapes", lambda **params: _with_classes(plain(**params)))
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text("from torch import nn\n\nnet = nn.Sequential(nn.Flatten(), nn.Linear(3072, 4))\n")
    plan = {
        **PLAN,
        "targets": [
            {"name": "one", "make": "net.py:net", "task": "classification"},
            {"name": "many", "make": "robplug/fcn-small"},
        ],
        "datasets": [{"name": "shapes", "params": {"samples": 3, "size": 32}}],
        "threats": [{"norm": "linf", "eps": 0.01, "targeted": True}],
        "transfer": [{"sources": ["one"], "victims": ["many"]}],
    }
    with pytest.raises(PlanError, match="many is for segmentation"):
        robplug.evaluate(plan, out=tmp_path / "run")


def _with_classes(data: Dataset) -> Dataset:
    y = data.y.flatten(1).amax(1)
    return replace(data, task="classification", y=y, others={"segmentation": data.y})


class Loosener:
    """Sets the detector's threshold through the shell, and leaves it so."""

    def run(self, target: Target, x: Tensor, *_: Any, **__: Any) -> Perturbed:
        target.module.nms_threshold = 0.95  # type: ignore[assignment]
        return Perturbed(x)


def test_a_threshold_that_an_attack_leaves_changed_is_put_back_and_noted() -> None:
    torch.manual_seed(0)
    target = robplug.target(AnchorDetector(conv_block(3, 4, stride=4), 4, 4, (12,)), task="detection")
    data = shapes.shapes_boxes(samples=1, size=32)
    assignment = Assignment(
        attack=Loosener(),
        target=target,
        norm=LINF,
        threat=ThreatModel("linf", 0.01),
        x=data.x,
        y=data.y,
        y_goal=None,
        rng=Rng(0, [0]),
    )
    outcome = run_guarded(assignment)
    assert not outcome.error and outcome.notes == ["changed attribute nms_threshold of the model"]
    assert target.module.nms_threshold == 0.7

"""Runs on pixels and boxes: what a row says, and what is left when attacks fail or a plan grows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import robplug
from robplug.errors import PlanError
from robplug.vision import shapes

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

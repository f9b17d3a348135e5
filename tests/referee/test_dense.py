"""Runs on pixels and boxes: what a row says, and what is left when attacks fail or a plan grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import robplug

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
    assert [row["status"] for row in results.rows()].count("error") == 3 and results.summary().finished
    before, after = results.summary().cells[0].quality["mAP 50"]
    assert before == after

"""What a run makes of the attacks: figures at every radius that a plan reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import robplug

PLAN: dict[str, Any] = {
    "probes": 0,
    "targets": [{"name": "boxes", "make": "robplug/ssd-plain", "params": {"width": 4}}],
    "datasets": [{"name": "shapes-boxes", "params": {"samples": 3, "size": 32}}],
    "attacks": [{"name": "dag/detection", "steps": 2}],
    "chunk": 2,
}


def test_a_radius_that_joins_a_finished_cell_has_its_precision(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    for eps in ([0.02], [0.001, 0.02], ["minimal"]):
        again, fresh = (
            robplug.evaluate({**PLAN, "threats": [{"norm": "linf", "eps": eps}]}, out=tmp_path / name).summary().cells
            for name in ("grown", f"fresh {eps}")
        )
        assert [(cell.eps, cell.quality) for cell in again] == [(cell.eps, cell.quality) for cell in fresh]
        assert all("mAP" in cell.quality for cell in again)

"""Both attacks in a plan: figures, sums of perturbations, permuted controls, transfer between tasks, the trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import robplug
from robplug.plugins import registry
from robplug.referee.results import Results

SAMPLES = 6
SHAPES = {"size": 32, "contrast": 0.1}
HUES = """
import torch
from robplug.vision.shapes import HUES

class Hues(torch.nn.Module):
    '''Classes by the product of the colour, a mean over so many pixels, with the classes' own colours.'''

    def __init__(self, pixels):
        super().__init__()
        self.pixels = pixels
        self.register_buffer("hues", torch.tensor([[0, 0, 0], *list(HUES.values())[:3]]).float()[:, :, None, None])

    def forward(self, x):
        mean = torch.nn.functional.avg_pool2d(x, self.pixels, 1, self.pixels // 2, count_include_pad=False)
        return torch.nn.functional.conv2d(mean - 0.5, self.hues) + torch.tensor([0.15, 0, 0, 0]).view(4, 1, 1)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    (folder / "net.py").write_text(HUES)
    torch.manual_seed(0)
    detector = registry().named_target("robplug/ssd-residual", width=8)
    data = robplug.dataset("shapes-boxes", split="train", samples=64, **SHAPES)
    robplug.train(detector, data, epochs=6, batch_size=8, optimizer="adam", lr=0.01, device="cpu")
    save_file(detector.state_dict(), folder / "boxes.safetensors")
    boxes = {"make": "robplug/ssd-residual", "params": {"width": 8}, "weights": str(folder / "boxes.safetensors")}
    pixels = {"make": f"{folder}/net.py:Hues"}
    names = ["sharp", "soft", "boxes"]
    plan = {
        "targets": [
            {"name": "sharp", **pixels, "params": {"pixels": 1}},
            {"name": "soft", **pixels, "params": {"pixels": 3}},
            {"name": "boxes", **boxes},
        ],
        "datasets": [{"name": "shapes", "samples": SAMPLES, "params": SHAPES}],
        "threats": [{"norm": "dag/perceptibility", "eps": ["minimal", 0.5]}],
        "attacks": [
            {"name": "dag/segmentation", "gamma": 0.01, "steps": 60, "targets": ["sharp", "soft"]},
            {"name": "dag/detection", "gamma": 0.01, "steps": 30, "rule": "goal", "targets": ["boxes"]},
        ],
        "transfer": [{"sources": names, "victims": names, "sums": [["sharp", "boxes"]], "permuted": True}],
        "chunk": 4,
        "probes": 0,
        "device": "cpu",
    }
    return robplug.evaluate(plan, out=tmp_path_factory.mktemp("run") / "out").path


def quality(run: Path, source: str, victim: str) -> dict[str, tuple[float, float]]:
    matrix = Results(run).summary().matrices[0]
    return next(one.quality for one in matrix.entries if (one.source, one.victim) == (source, victim))


def kept(run: Path, target: str) -> tuple[Tensor, Tensor]:
    """Returns x and x_adv of what was found on a target."""
    for folder in (run / "cells").iterdir():
        files = sorted(folder.glob("adversarials-*"))
        if files and json.loads((folder / "cell.json").read_text())["target"] == target:
            parts = [load_file(file) for file in files]
            return tuple(torch.cat([part[name] for part in parts]) for name in ("x", "x_adv"))  # type: ignore[return-value]
    raise AssertionError(target)


def test_figures_fall_on_the_network_that_was_attacked(run: Path) -> None:
    for name in ("sharp", "soft"):
        before, after = quality(run, name, name)["foreground mIoU"]
        assert before > 0.8 and after < 0.05
    before, after = quality(run, "boxes", "boxes")["mAP 50"]
    assert before > 0.5 and after < 0.6 * before


def test_the_permuted_control_does_not_break(run: Path) -> None:
    before, after = quality(run, "soft, permuted", "soft")["foreground mIoU"]
    assert after > quality(run, "soft", "soft")["foreground mIoU"][1] + 0.3 * before


def test_the_sum_over_two_tasks_is_judged_as_x_and_both_perturbations(run: Path) -> None:
    (x, one), (_, other) = kept(run, "sharp"), kept(run, "boxes")
    x_adv = (x.double() + (one.double() - x.double()) + (other.double() - x.double())).clamp(0, 1).float()
    scope: dict[str, Any] = {}
    exec(HUES, scope)  # noqa: S102
    y = robplug.dataset("shapes", samples=SAMPLES, **SHAPES).y
    answer = robplug.target(scope["Hues"](1), task="segmentation").predict(x_adv)
    before, after = quality(run, "sharp + boxes", "sharp")["pixel accuracy"]
    assert after == pytest.approx(float((answer == y).double().mean())) and after < before
    assert quality(run, "sharp + boxes", "boxes")["mAP 50"][1] >= 0


def test_claims_distances_and_traces_are_stored(run: Path) -> None:
    results = Results(run)
    rows = [row for row in results.rows() if row["source"] in (None, "") and row["status"] == "broken"]
    assert rows and all(row["distance"] > 0 and row["measures"]["linf"] > 0 for row in rows)
    assert all(row["claim"] is not None for row in rows)
    page = results.report().read_text(encoding="utf-8")
    assert "what the attack followed against its steps" in page and "samples come to 0" in page
    steps = {tuple(load_file(file)["trace"].shape)[1] for file in run.rglob("trace-*")}
    assert steps == {60, 30}

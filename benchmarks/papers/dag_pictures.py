"""The pictures of the page on dense adversaries: attacked images, and predictions in a wanted shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import robplug
from robplug.plugins import registry
from robplug.referee.overlays import drawn_over
from robplug.referee.pictures import read_arrays
from robplug.referee.rundir import load_run
from robplug.rng import Rng
from robplug_dag import dag, fooling_start, label_map, strongest_rivals, text_mask

ENLARGED = 3
GAP = 6
SIDE = 96
NOISE = (0.4, 0.6)
"""Wide beside the shapes' contrast of .04 and their noise of .01."""
PARTS = ("x", "x_adv", "before", "after")
SHOWN = ("U-Net, A", "residual, A")
Array = np.ndarray[Any, Any]


def draw_pictures(run: Path, folder: Path) -> list[str]:
    """Writes three pictures and returns what is to be said of the last two.

    Args:
        run: of the plan with the tables.
        folder: where the pictures go.
    """
    cells = [cell for cell in load_run(run).own if cell.target in SHOWN]
    examples = [read_arrays(cell.path / "examples.safetensors", PARTS) for cell in cells]
    _save([_strip(*(one[part][0] for part in PARTS)) for one in examples], folder / "dag-small-attacked.png")
    model = registry().named_target("robplug/unet-small")
    model.load_state_dict(load_file("runs/dag-small/models/unet-a/weights.safetensors"))
    model.eval().requires_grad_(False)
    return [fancy(model, folder / "dag-small-fancy.png"), fooling(model, folder / "dag-small-fooling.png")]


def fancy(model: nn.Module, path: Path) -> str:
    """Draws letters as the prediction of an image of shapes; returns how many pixels are predicted as wanted."""
    x = robplug.dataset("shapes", samples=1, size=SIDE).x
    goals = label_map(text_mask("DAG", SIDE, SIDE), inside=1)[None]
    x_adv, record = dag(model, x, strongest_rivals(model(x), goals), goals, rule="goal")
    _save([_strip(x[0], x_adv[0], model(x).argmax(1)[0], model(x_adv).argmax(1)[0])], path)
    return _said("fancy image", model(x_adv), goals, int(record.iterations[0]))


def fooling(model: nn.Module, path: Path) -> str:
    """Draws letters as the prediction of noise; returns how many pixels are predicted as wanted."""
    goals = label_map(text_mask("2017", SIDE, SIDE), inside=2)[None]
    x, rivals = fooling_start(model, goals, Rng(0, [0]), bounds=NOISE)
    x_adv, record = dag(model, x, rivals, goals, gamma=1 / 255, rule="goal")
    _save([_strip(x[0], x_adv[0], model(x).argmax(1)[0], model(x_adv).argmax(1)[0])], path)
    return _said("fooling image", model(x_adv), goals, int(record.iterations[0]))


def _said(what: str, logits: Tensor, goals: Tensor, steps: int) -> str:
    share = 100 * float((logits.argmax(1) == goals).double().mean())
    return f"{what}: {share:.2f} % of the pixels are predicted as wanted after {steps} steps"


def _strip(x: Array | Tensor, x_adv: Array | Tensor, before: Array | Tensor, after: Array | Tensor) -> list[Array]:
    """Returns the image, what is added to it ten times enlarged, and its predictions before and after."""
    x, x_adv, before, after = (torch.as_tensor(part).numpy() for part in (x, x_adv, before, after))
    return [x, 0.5 + 10 * (x_adv - x), x_adv, drawn_over(x, before), drawn_over(x_adv, after)]


def _save(strips: list[list[Array]], path: Path) -> None:
    """Writes rows of images (3, H, W), enlarged, with white between them."""
    rows = []
    for strip in strips:
        padded = [np.pad(image.clip(0, 1), ((0, 0), (0, GAP), (0, GAP)), constant_values=1.0) for image in strip]
        rows.append(np.concatenate(padded, 2))
    whole = np.concatenate(rows, 1)[:, :-GAP, :-GAP].transpose(1, 2, 0)
    picture = Image.fromarray((255 * whole).round().astype(np.uint8))
    width, height = picture.size
    picture.resize((ENLARGED * width, ENLARGED * height), Image.Resampling.NEAREST).save(path, optimize=True)

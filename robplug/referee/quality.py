"""How good the answers of a whole cell are, before and after the attack, for tasks with many answers a sample.

A sample counts with its answer under attack where that answer is valid and its distance within the radius, and with its
clean answer elsewhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from robplug.referee.rundir import Reading, StoredCell

Array = np.ndarray[Any, Any]
Quality = dict[str, tuple[float, float]]
"""Values before and after the attack, by name; the first name is the one that is asked for most."""
BACKGROUND = "0"


def quality(cell: StoredCell, reading: Reading) -> Quality:
    """Returns the figures of a cell at a radius; empty for classification, and for a detector's unfinished cell."""
    stored = {one["eps"]: one["values"] for one in cell.record.get("quality", ())}  # boxes need all images at once
    if reading.eps in stored:
        return {name: (float(before), float(after)) for name, (before, after) in stored[reading.eps].items()}
    names = {name for row in cell.scores for name in row}
    if "clean.pixel_accuracy" not in names:
        return {}
    counted = attacked(cell, reading)
    labels = sorted({name.rpartition(".")[2] for name in names if ".union." in name}, key=int)
    sums = [_sums(cell, counted, labels, under_attack) for under_attack in (False, True)]
    foreground = [place for place, label in enumerate(labels) if label != BACKGROUND]
    before, after = ({"foreground mIoU": _mean(iou[foreground]), "mIoU": _mean(iou)} for iou in sums)
    pixels = [_mean(_pick(cell, counted, "pixel_accuracy", under_attack)) for under_attack in (False, True)]
    return {**{name: (before[name], after[name]) for name in before}, "pixel accuracy": (pixels[0], pixels[1])}


def attacked(cell: StoredCell, reading: Reading) -> Array:
    """(N,) bool: samples that count with their answer under attack."""
    answered = np.array([any(name.startswith("adv.") for name in row) for row in cell.scores], dtype=bool)
    own = not cell.minimal and reading.eps == cell.record["threat"]["eps"]
    return answered if own else answered & (cell.distance <= reading.allowed)


def _sums(cell: StoredCell, counted: Array, labels: list[str], under_attack: bool) -> Array:
    """Returns the intersection over union of each class, summed over all pixels of all samples; nan without any."""
    union = np.array([np.nansum(_pick(cell, counted, f"union.{label}", under_attack)) for label in labels])
    both = np.array([np.nansum(_pick(cell, counted, f"intersection.{label}", under_attack)) for label in labels])
    with np.errstate(invalid="ignore"):
        found: Array = both / union
    return found


def _pick(cell: StoredCell, counted: Array, name: str, under_attack: bool) -> Array:
    """Returns (N,) a score of each sample, nan where it has none."""
    use = [("adv" if under_attack and adv else "clean") for adv in counted]
    return np.array([row.get(f"{kind}.{name}", np.nan) for kind, row in zip(use, cell.scores, strict=True)])


def _mean(values: Array) -> float:
    """Returns the mean of what is a number; 0 where there is none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else 0.0

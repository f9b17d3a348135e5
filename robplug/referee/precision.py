"""The mean average precision of detectors, computed by pycocotools from the answers of a finished cell.

It cannot be put together from rows: detections of all images are ranked together.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from robplug.errors import PlanError, RobplugError
from robplug.referee.quality import attacked
from robplug.referee.rundir import load_cell
from robplug.referee.store import CellStore
from robplug.tasks import PADDING

NAMES = ("mAP 50", "mAP")
"""At an overlap of .5 (PASCAL VOC's), and the mean over .5 to .95 (COCO's)."""


def check_computable(y: Tensor, where: str) -> None:
    """Refuses a plan with detectors where their precision could not be computed at the end.

    Args:
        y: (N, M, 5) boxes of all samples.
        where: how errors speak of the plan.

    Raises:
        PlanError: there is no box, or a package is missing.
    """
    if not bool((y[..., 4] != PADDING).any()):
        raise PlanError(where, "expected samples with at least one box, got none; choose other samples, or more")
    try:
        import pycocotools  # noqa: F401
    except ModuleNotFoundError as error:
        raise PlanError(where, "detection needs the package pycocotools: pip install 'robplug[vision]'") from error


def has_precision(record: Mapping[str, Any]) -> bool:
    """Whether cell.json has what `precision` returns for all its radii, and not for those of an earlier plan."""
    wanted = [reading["eps"] for reading in record["readings"]] or [None]
    return {*wanted} <= {one["eps"] for one in record.get("quality", ())}


def precision(path: Path, y: Tensor) -> list[dict[str, Any]]:
    """Returns what `robplug.referee.quality` reads from cell.json, an entry a radius.

    Args:
        path: directory of the finished cell.
        y: (N, M, 5) boxes of all its samples.
    """
    cell = load_cell(path)
    answers: dict[int, tuple[Any, Any]] = {}
    for chunk in cell.record["chunks"]:
        kept = CellStore(path).tensors("answers", int(chunk["index"]), ("sample", "clean", "adv"))
        rows = zip(kept["sample"].tolist(), kept["clean"], kept["adv"], strict=True)
        answers.update({sample: (_rows(clean), _rows(adv)) for sample, clean, adv in rows})
    samples = cell.sample.tolist()
    boxes = [_rows(y[sample]) for sample in samples]
    before, after = zip(*(answers[sample] for sample in samples), strict=True)
    clean = mean_average_precision(boxes, before)
    found = []
    for reading in cell.readings:
        counts = attacked(cell, reading)
        mixed = [adv if counts[i] else before[i] for i, adv in enumerate(after)]
        values = mean_average_precision(boxes, mixed)
        found.append({"eps": reading.eps, "values": {name: [clean[name], values[name]] for name in NAMES}})
    return found


def mean_average_precision(boxes: Sequence[Any], detections: Sequence[Any]) -> dict[str, float]:
    """Returns the mean average precisions of a data set.

    Args:
        boxes: of each image an array (M, 5), rows x1, y1, x2, y2, label.
        detections: of each image an array (D, 6), rows x1, y1, x2, y2, score, label.

    Source: Everingham et al. 2010 (mAP 50 interpolated as in Lin et al. 2014), Lin et al. 2014.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = [
        {"image_id": image, "category_id": int(row[4]), "bbox": _corner_and_size(row), "area": _area(row), "iscrowd": 0}
        for image, rows in enumerate(boxes)
        for row in rows
    ]
    found = [
        {"image_id": image, "category_id": int(row[5]), "bbox": _corner_and_size(row), "score": float(row[4])}
        for image, rows in enumerate(detections)
        for row in rows
    ]
    if not truth:
        raise RobplugError("expected at least one box to compute a precision, got none; choose other samples")
    if not found:
        return dict.fromkeys(NAMES, 0.0)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints tables
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": image} for image in range(len(boxes))],
            "categories": [{"id": label} for label in sorted({int(row[4]) for rows in boxes for row in rows})],
            "annotations": [{"id": number + 1, **entry} for number, entry in enumerate(truth)],
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {"mAP 50": float(evaluation.stats[1]), "mAP": float(evaluation.stats[0])}


def _rows(padded: Tensor) -> Any:
    """Returns the rows that are boxes; those that are no numbers find nothing."""
    rows = padded.double().numpy()
    return rows[(rows[:, -1] != PADDING) & np.isfinite(rows).all(axis=1)]


def _corner_and_size(row: Any) -> list[float]:
    return [float(row[0]), float(row[1]), float(row[2] - row[0]), float(row[3] - row[1])]


def _area(row: Any) -> float:
    return float(np.prod(np.maximum(row[2:4] - row[:2], 0)))

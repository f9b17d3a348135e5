"""Example images of the report as PNG inside data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.image import imsave
from safetensors import SafetensorError
from safetensors.numpy import load_file

from robplug.errors import StoreError
from robplug.referee.overlays import drawn_over
from robplug.referee.rundir import StoredCell

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Example:
    """One sample before and after an attack.

    Attributes:
        key: of the cell.
        row: the sample's row of the store.
        clean: data URI.
        adversarial: data URI.
        difference: data URI; grey is no change, and the largest change reaches black or white.
        magnified: how many times the difference is magnified.
        channels: of the sample; others than 1 and 3 are shown by their first.
        before: data URI of the answer drawn over the sample, or "" for one class.
        after: likewise under attack, over the adversarial sample.
    """

    key: str
    row: dict[str, Any]
    clean: str
    adversarial: str
    difference: str
    magnified: float
    channels: int
    before: str = ""
    after: str = ""


def first_example(cells: Sequence[StoredCell]) -> Example | None:
    """Returns one example of the first cell that has images, a broken one if there is any; None without images."""
    for cell in cells:
        arrays = read_arrays(cell.path / "examples.safetensors", ("sample", "x", "x_adv"))
        if arrays and (arrays["x"].ndim != 4 or arrays["x_adv"].shape != arrays["x"].shape):
            continue  # only images can be shown
        samples = np.asarray(arrays.get("sample", ()), dtype=np.int64)
        rows = {row["sample"]: row for row in cell.table.filter(np.isin(cell.sample, samples)).to_pylist()}
        known = [i for i, sample in enumerate(samples.tolist()) if sample in rows]
        if known:
            best = min(known, key=lambda i: rows[int(samples[i])]["status"] != "broken")
            row = rows[int(samples[best])]
            return _example(cell, row, {name: array[best] for name, array in arrays.items()})
    return None


def read_arrays(path: Path, names: Sequence[str]) -> dict[str, Array]:
    """Returns the arrays of a file, those with as many entries as the named ones; nothing if there is no such file.

    Raises:
        StoreError: it is damaged, or lacks one of the names.
    """
    if not path.is_file():
        return {}
    try:
        arrays = load_file(path)
        lengths = {len(arrays[name]) for name in names}
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise StoreError(path, f"is damaged ({error}); remove it, the numbers do not need it") from None
    if len(lengths) > 1:
        return {}
    return {name: array for name, array in arrays.items() if array.ndim and len(array) in lengths}


def _example(cell: StoredCell, row: dict[str, Any], arrays: dict[str, Array]) -> Example:
    x, x_adv = arrays["x"], arrays["x_adv"]
    low, high = cell.record["threat"]["bounds"]
    change = x_adv.astype(np.float64) - x
    largest = float(np.nanmax(np.abs(change))) or 1.0
    return Example(
        key=cell.record["key"],
        row=row,
        clean=_png((x - low) / (high - low)),
        adversarial=_png((x_adv - low) / (high - low)),
        difference=_png(0.5 + 0.5 * change / largest),
        magnified=(high - low) / (2 * largest),
        channels=len(x),
        before=_png(drawn_over((x - low) / (high - low), arrays["before"])) if "before" in arrays else "",
        after=_png(drawn_over((x_adv - low) / (high - low), arrays["after"])) if "after" in arrays else "",
    )


def _png(image: Array) -> str:
    """Returns a (C, H, W) image of values from 0 to 1 as a data URI."""
    shown = image if len(image) == 3 else image[[0, 0, 0]]
    data = io.BytesIO()
    values = (np.nan_to_num(shown).clip(0, 1) * 255).round().astype(np.uint8)
    imsave(data, np.ascontiguousarray(values.transpose(1, 2, 0)), format="png")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode("ascii")

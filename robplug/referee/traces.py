"""What an attack followed step by step, as a curve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np

from robplug.referee.figures import ACCENT, RULE, STYLE, canvas, svg
from robplug.referee.pictures import read_arrays
from robplug.referee.rundir import StoredCell

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Trace:
    """The traces of a cell.

    Attributes:
        values: (N, T), a row a sample that began above 0; each as a share of its first value.
    """

    values: Array

    @property
    def ended(self) -> str:
        """Says how many samples came to 0, and after how many steps on average."""
        ended = np.asarray(self.values.min(axis=1) <= 0)
        steps = np.where(ended, (self.values > 0).sum(axis=1), self.values.shape[1])
        return f"{ended.sum()} of {len(ended)} samples come to 0, {steps.mean():.1f} steps on average"


def read_trace(cell: StoredCell) -> Trace | None:
    """Returns the traces of a cell, or None where its attack has left none."""
    files = [cell.path / f"trace-{int(chunk['index']):05d}.safetensors" for chunk in cell.record["chunks"]]
    parts = [arrays["trace"] for path in files if "trace" in (arrays := read_arrays(path, ("trace",)))]
    parts = [part for part in parts if part.size and part.ndim == 2]
    if not parts or len({part.shape[1] for part in parts}) > 1:
        return None
    values = np.concatenate(parts).astype(np.float64)
    begun = values[np.isfinite(values).all(axis=1) & (values[:, 0] > 0)]
    return Trace(begun / begun[:, :1]) if len(begun) else None


@matplotlib.rc_context(STYLE)
def draw(trace: Trace) -> str:
    """Draws the mean and the middle half over the samples; returns an ``<svg>`` element."""
    figure, axes = canvas(200, left=0.12, bottom=0.19, right=0.97, top=0.96)
    steps = np.arange(trace.values.shape[1])
    low, high = np.quantile(trace.values, [0.25, 0.75], axis=0)
    axes.fill_between(steps, low, high, color=ACCENT, alpha=0.2, linewidth=0)
    axes.plot(steps, trace.values.mean(axis=0), color=ACCENT, linewidth=2)
    axes.set_xlim(0, max(len(steps) - 1, 1))
    axes.set_ylim(0, 1.02)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
    axes.set_xlabel("step", fontsize=9.5, labelpad=2)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    return svg(figure, "what the attack followed against its steps")

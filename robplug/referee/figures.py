"""The figures of the report: SVG that takes its colours from the page.

Matplotlib draws with stand-in colours, which are replaced by the page's CSS variables, so that one figure serves the
light and the dark theme and paper.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from robplug.referee import formats
from robplug.referee.rundir import StoredCell
from robplug.referee.summary import CellSummary, Summary
from robplug.referee.worst import WorstCase

Array = np.ndarray[Any, Any]
COLOURS = {"#010203": "--ink", "#010204": "--quiet", "#010205": "--rule", "#010206": "--accent", "#010207": "--paper"}
INK, QUIET, RULE, ACCENT, PAPER = COLOURS
DASHES: dict[str, Any] = {"gradients": "-", "scores": (0, (5, 2)), "labels": (0, (1, 1.6))}
"""Line style by what an attack asks of the model."""
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "robplug",  # the same run gives the same file
    "text.parse_math": False,  # a name with dollar signs is a name
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": QUIET,
    "axes.linewidth": 0.6,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "axes.labelcolor": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
WIDTH = 345  # points: about a phone's width, so that text keeps its size there
POINTS = 300  # of a step curve
NAME = 56  # characters that fit into a figure


@matplotlib.rc_context(STYLE)
def curve(
    cases: Sequence[WorstCase], cells: Sequence[CellSummary], stored: dict[str, StoredCell], summary: Summary
) -> str:
    """Draws robust accuracy against the radius for one subject: the worst case, and each attack for itself.

    Args:
        cases: the worst cases of the subject, by radius.
        cells: its rows of the summary.
        stored: cells by key.
        summary: names the attacks.

    Returns:
        An ``<svg>`` element.
    """
    limit = _largest_radius(cells, stored)
    figure, axes = canvas(270, left=0.12, bottom=0.15, right=0.83, top=0.97)
    lines = []
    for number in sorted({cell.attack for cell in cells}):
        own = [cell for cell in cells if cell.attack == number]
        line = _attack_line(own, stored[own[0].key], limit)
        axes.plot(*line.drawn, color=QUIET, linewidth=0.8, linestyle=DASHES[summary.attack(number).needs], alpha=0.9)
        lines.append((number, line))
    for height, text in _labels([(float(line.y[-1]), number) for number, line in lines]):
        axes.text(1.02, height, text, transform=axes.get_yaxis_transform(), va="center", fontsize=9.5, color=QUIET)
    if cases:
        _draw_worst_case(axes, cases, [line for _, line in lines])
    _radius_axis(axes, [case.eps for case in cases], limit, "radius")
    axes.set_ylim(0, 1.02)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    return svg(figure, "robust accuracy against the radius")


@dataclass(frozen=True)
class _Line:
    """Robust accuracy y at radii x: a straight line between points, or steps."""

    x: Array
    y: Array
    steps: bool

    @property
    def drawn(self) -> tuple[Array, Array]:
        """The corners of the line."""
        return (np.repeat(self.x, 2)[1:], np.repeat(self.y, 2)[:-1]) if self.steps else (self.x, self.y)

    def at(self, x: Array) -> Array:
        """Returns the height at other radii."""
        if self.steps:
            return self.y[np.searchsorted(self.x, x, side="right") - 1]
        return np.interp(x, self.x, self.y)


def _draw_worst_case(axes: Any, cases: Sequence[WorstCase], attacks: Sequence[_Line]) -> None:
    """Draws marks at the plan's radii; the line between them never lies above that of an attack."""
    radii = np.array([case.eps for case in cases])
    low = np.array([case.low.value for case in cases])
    x = np.unique(np.concatenate([np.linspace(0, radii[-1], POINTS), radii]))
    between = np.interp(x, np.append(0, radii), np.append(cases[0].clean.value or 0.0, low))
    y = np.minimum.reduce([between, *(line.at(x) for line in attacks)])
    y[np.isin(x, radii)] = low
    axes.plot(x, y, color=ACCENT, linewidth=2)
    for case, height in zip(cases, low, strict=True):
        fill = PAPER if case.refused else ACCENT
        axes.plot([case.eps] * 2, [case.low.low, case.high.high], color=INK, linewidth=0.9, zorder=4)
        axes.plot([case.eps] * 2, [height, case.high.value], color=ACCENT, linewidth=4, alpha=0.4, zorder=4)
        axes.plot(case.eps, height, "o", markersize=6, markerfacecolor=fill, markeredgecolor=ACCENT, zorder=5)


def _attack_line(own: Sequence[CellSummary], cell: StoredCell, limit: float) -> _Line:
    """Returns the measured points of a fixed attack, or what a minimal one says of every radius."""
    if not cell.minimal:
        points = sorted((one.eps or 0.0, (one.robust_accuracy and one.robust_accuracy.value) or 0.0) for one in own)
        start = (0.0, own[0].clean.value or 0.0)
        x, y = np.array([start, *points]).T
        return _Line(x, y, steps=False)
    distances = np.sort(cell.distance[cell.status == "broken"])
    start_count = int(np.isin(cell.status, ("robust", "broken")).sum())
    x = np.concatenate([[0.0], distances[distances <= limit]])
    y = (start_count - np.arange(len(x))) / max(len(cell.status), 1)
    kept = np.unique(np.linspace(0, len(x) - 1, min(len(x), POINTS)).round().astype(int))
    return _Line(np.append(x[kept], limit), np.append(y[kept], y[-1]), steps=True)


def _labels(ends: list[tuple[float, int]], gap: float = 0.045, shown: int = 3) -> list[tuple[float, str]]:
    """Puts the numbers of attacks beside the ends of their lines; neighbours closer than a line of text share one."""
    clusters: list[list[tuple[float, int]]] = []
    for end in sorted(ends):
        if clusters and end[0] - clusters[-1][0][0] < gap:
            clusters[-1].append(end)
        else:
            clusters.append([end])
    texts = []
    for cluster in clusters:
        numbers = sorted(number for _, number in cluster)
        more = f" +{len(numbers) - shown}" if len(numbers) > shown else ""
        height = sum(value for value, _ in cluster) / len(cluster)
        texts.append((height, " ".join(str(number) for number in numbers[:shown]) + more))
    return texts


@matplotlib.rc_context(STYLE)
def distances(cells: Sequence[CellSummary], stored: dict[str, StoredCell], summary: Summary) -> str:
    """Draws, for each attack on one subject, how far its adversarial examples are.

    A fixed attack has a mark per radius, a minimal one a single mark.

    Returns:
        An ``<svg>`` element, or "" if there is no adversarial example.
    """
    rows = [(number, _found(number, cells, stored)) for number in sorted({cell.attack for cell in cells})]
    rows = [(number, found) for number, found in rows if found]
    if not rows:
        return ""
    limit = _largest_radius(cells, stored)
    reach = max(limit, min(3 * limit, max(float(np.quantile(one, 0.9)) for _, found in rows for one in found) * 1.05))
    height = 30 * len(rows) + 36
    figure, axes = canvas(height, left=0.03, bottom=30 / height, right=0.97, top=1 - 4 / height)
    for place, (number, found) in enumerate(rows):
        axes.text(
            0,
            place - 0.34,
            f"{number}  {_shortened(summary.attack(number).name)}",
            fontsize=9.5,
            va="center",
            color=INK,
        )
        for one in found:
            _draw_strip(axes, one, place + 0.12)
    axes.set_ylim(len(rows) - 0.4, -0.75)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    radii = sorted({cell.eps for cell in cells if cell.eps is not None})
    for eps in radii:
        axes.axvline(eps, color=RULE, linewidth=0.8, zorder=0)
    _radius_axis(axes, radii, reach, "distance")
    return svg(figure, "distances of the adversarial examples")


def _shortened(name: str) -> str:
    """A figure would cut what does not fit without a sign; tables have the whole name."""
    return name if len(name) <= NAME else name[: NAME - 1] + "\u2026"


def _draw_strip(axes: Any, found: Array, height: float) -> None:
    low, first, median, third, high = np.quantile(found, [0.05, 0.25, 0.5, 0.75, 0.95])
    axes.plot([low, high], [height, height], color=QUIET, linewidth=0.8)
    axes.plot([first, third], [height, height], color=QUIET, linewidth=5, alpha=0.55, solid_capstyle="butt")
    axes.plot([median, median], [height - 0.17, height + 0.17], color=ACCENT, linewidth=2, solid_capstyle="butt")


def _found(number: int, cells: Sequence[CellSummary], stored: dict[str, StoredCell]) -> list[Array]:
    keys = dict.fromkeys(cell.key for cell in cells if cell.attack == number)
    found = [stored[key].distance[stored[key].status == "broken"] for key in keys]
    return [one for one in found if len(one)]


def _largest_radius(cells: Sequence[CellSummary], stored: dict[str, StoredCell]) -> float:
    """The right end of the axis: the plan's largest radius, or nearly all distances where it has none."""
    radii = [cell.eps for cell in cells if cell.eps is not None]
    if radii and max(radii) > 0:
        return max(radii) * 1.04
    found = [one for number in {cell.attack for cell in cells} for one in _found(number, cells, stored)]
    return float(np.quantile(np.concatenate(found), 0.95)) * 1.04 if found else 1.0


def _radius_axis(axes: Any, radii: list[float], limit: float, name: str) -> None:
    """Puts the ticks at the plan's radii, leaving out labels that would touch, the largest first to stay."""
    axes.set_xlim(0, limit)
    axes.set_xlabel(name, fontsize=9.5, labelpad=2)
    if not radii:
        return
    labelled = [0.0]
    for eps in sorted(radii, reverse=True):
        if all(abs(eps - other) > 0.11 * limit for other in labelled):
            labelled.append(eps)
    ticks = sorted({0.0, *radii})
    axes.set_xticks(ticks, [formats.radius(tick) if tick in labelled else "" for tick in ticks])


def canvas(height: float, **margins: float) -> tuple[Figure, Any]:
    """Returns an empty figure of the width of a panel, and its axes."""
    figure = Figure(figsize=(WIDTH / 72, height / 72))
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    figure.subplots_adjust(**margins)
    axes.tick_params(length=2.5, width=0.6, labelsize=9.5)
    return figure, axes


def svg(figure: Figure, title: str) -> str:
    """Returns the figure as an element to stand in a page: no prologue, no metadata, no style of its own."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    page = text.getvalue()
    page = page[page.index("<svg") :]
    page = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>", "", page, flags=re.DOTALL)
    page = re.sub(r' (?:xmlns(?::xlink)?|version)="[^"]*"| id="[A-Za-z0-9.]+_\d+"', "", page)
    page = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", page)
    page = re.sub(r'<svg width="[^"]*" height="[^"]*"|<svg height="[^"]*" width="[^"]*"', "<svg", page, count=1)
    for stand_in, variable in COLOURS.items():
        page = page.replace(stand_in, f"var({variable})")
    return page.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)

"""The figures of the report: SVG that takes its colours from the page.

Matplotlib draws with stand-in colours, which are replaced by the page's CSS variables, so that one figure serves the
light and the dark theme and paper.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from robplug.referee import formats
from robplug.referee.rundir import StoredCell
from robplug.referee.summary import CellSummary, Summary
from robplug.referee.worst import WorstCase

COLOURS = {"#010203": "--ink", "#010204": "--quiet", "#010205": "--rule", "#010206": "--accent", "#010207": "--paper"}
INK, QUIET, RULE, ACCENT, PAPER = COLOURS
DASHES: dict[str, Any] = {"gradients": "-", "scores": (0, (5, 2)), "labels": (0, (1, 1.6))}
"""Line style by what an attack asks of the model."""
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "robplug",  # the same run gives the same file
    "text.parse_math": False,  # a name with dollar signs is a name
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": QUIET,
    "axes.linewidth": 0.6,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "axes.labelcolor": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
WIDTH = 372  # points: about a phone's width, so that text keeps its size there
POINTS = 300  # of a step curve


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
    figure, axes = _canvas(270, left=0.105, bottom=0.15, right=0.86, top=0.97)
    ends = []
    for number in sorted({cell.attack for cell in cells}):
        own = [cell for cell in cells if cell.attack == number]
        x, y = _attack_curve(own, stored[own[0].key], limit)
        style = DASHES[summary.attack(number).needs]
        step = "steps-post" if stored[own[0].key].minimal else "default"
        axes.plot(x, y, color=QUIET, linewidth=0.8, linestyle=style, drawstyle=step, alpha=0.9)
        ends.append((float(y[-1]), number))
    for height, text in _labels(ends):
        axes.text(1.02, height, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8, color=QUIET)
    if cases:
        _draw_worst_case(axes, cases)
    _radius_axis(axes, sorted({case.eps for case in cases}), limit)
    axes.set_ylim(0, 1.02)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    return _svg(figure, "robust accuracy against the radius")


def _draw_worst_case(axes: Any, cases: Sequence[WorstCase]) -> None:
    x = [case.eps for case in cases]
    clean = cases[0].clean.value or 0.0
    axes.fill_between(
        [0, *x],
        [clean, *(case.low.low for case in cases)],
        [clean, *(case.high.high for case in cases)],
        color=ACCENT,
        alpha=0.14,
        linewidth=0,
    )
    axes.plot([0, *x], [clean, *(case.low.value for case in cases)], color=ACCENT, linewidth=2)
    for case in cases:
        fill = PAPER if case.refused else ACCENT
        low, high = case.low.value, case.high.value
        axes.plot([case.eps, case.eps], [low, high], color=ACCENT, linewidth=4, alpha=0.4, solid_capstyle="butt")
        axes.plot(case.eps, low, "o", markersize=5.5, markerfacecolor=fill, markeredgecolor=ACCENT, zorder=5)


def _attack_curve(own: Sequence[CellSummary], cell: StoredCell, limit: float) -> tuple[Any, Any]:
    """Returns radii and robust accuracies: measured points of a fixed attack, all distances of a minimal one."""
    if not cell.minimal:
        points = sorted((one.eps or 0.0, (one.robust_accuracy and one.robust_accuracy.value) or 0.0) for one in own)
        return [0.0, *(x for x, _ in points)], [own[0].clean.value or 0.0, *(y for _, y in points)]
    distances = np.sort(cell.distance[cell.status == "broken"])
    start = int(np.isin(cell.status, ("robust", "broken")).sum())
    x = np.concatenate([[0.0], distances[distances <= limit]])
    y = (start - np.arange(len(x))) / max(len(cell.status), 1)
    kept = np.unique(np.linspace(0, len(x) - 1, min(len(x), POINTS)).round().astype(int))
    return np.append(x[kept], limit), np.append(y[kept], y[-1])


def _labels(ends: list[tuple[float, int]], gap: float = 0.045, shown: int = 4) -> list[tuple[float, str]]:
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
    height = 26 * len(rows) + 34
    figure, axes = _canvas(height, left=0.03, bottom=30 / height, right=0.97, top=1 - 4 / height)
    for place, (number, found) in enumerate(rows):
        axes.text(0, place - 0.34, f"{number}  {summary.attack(number).name}", fontsize=8.5, va="center", clip_on=True)
        for one in found:
            _draw_strip(axes, one, place + 0.12)
    axes.set_ylim(len(rows) - 0.4, -0.75)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    radii = sorted({cell.eps for cell in cells if cell.eps is not None})
    for eps in radii:
        axes.axvline(eps, color=RULE, linewidth=0.8, zorder=0)
    _radius_axis(axes, radii, reach)
    return _svg(figure, "distances of the adversarial examples")


def _draw_strip(axes: Any, found: np.ndarray[Any, Any], height: float) -> None:
    low, first, median, third, high = np.quantile(found, [0.05, 0.25, 0.5, 0.75, 0.95])
    axes.plot([low, high], [height, height], color=QUIET, linewidth=0.8)
    axes.plot([first, third], [height, height], color=QUIET, linewidth=5, alpha=0.55, solid_capstyle="butt")
    axes.plot([median, median], [height - 0.17, height + 0.17], color=ACCENT, linewidth=2, solid_capstyle="butt")


def _found(number: int, cells: Sequence[CellSummary], stored: dict[str, StoredCell]) -> list[np.ndarray[Any, Any]]:
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


def _radius_axis(axes: Any, radii: list[float], limit: float) -> None:
    """Puts the ticks at the plan's radii, leaving out labels that would touch, the largest first to stay."""
    axes.set_xlim(0, limit)
    axes.set_xlabel("distance", fontsize=8.5, labelpad=2)
    if not radii:
        return
    labelled = [0.0]
    for eps in sorted(radii, reverse=True):
        if all(abs(eps - other) > 0.11 * limit for other in labelled):
            labelled.append(eps)
    ticks = sorted({0.0, *radii})
    axes.set_xticks(ticks, [formats.radius(tick) if tick in labelled else "" for tick in ticks])


def _canvas(height: float, **margins: float) -> tuple[Figure, Any]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH / 72, height / 72))
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        figure.subplots_adjust(**margins)
        axes.tick_params(length=2.5, width=0.6, labelsize=8.5)
    return figure, axes


def _svg(figure: Figure, title: str) -> str:
    """Returns the figure as an element to stand in a page: no prologue, no metadata, no style of its own."""
    text = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:xmlns(?::xlink)?|version)="[^"]*"| id="[A-Za-z0-9.]+_\d+"', "", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r'<svg width="[^"]*" height="[^"]*"|<svg height="[^"]*" width="[^"]*"', "<svg", svg, count=1)
    for stand_in, variable in COLOURS.items():
        svg = svg.replace(stand_in, f"var({variable})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)

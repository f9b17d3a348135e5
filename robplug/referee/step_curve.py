"""The figure of what more steps of PGD gain: the share of samples left, and the margin that was reached."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib

from robplug.referee.figures import ACCENT, INK, QUIET, RULE, STYLE, canvas, svg
from robplug.referee.findings import StepPoint


@matplotlib.rc_context(STYLE)
def draw(points: Sequence[StepPoint]) -> str:
    """Draws robust accuracy with its interval, and dashed the median margin if there is one, against the steps.

    Returns:
        An ``<svg>`` element.
    """
    figure, axes = canvas(210, left=0.12, bottom=0.17, right=0.84, top=0.95)
    steps = [point.steps for point in points]
    axes.plot(steps, [point.robust.value for point in points], color=ACCENT, linewidth=2, marker="o", markersize=4)
    for point in points:
        axes.plot([point.steps] * 2, [point.robust.low, point.robust.high], color=INK, linewidth=0.9, zorder=4)
    axes.set_xscale("log")
    axes.set_xticks(steps, [str(count) for count in steps])
    axes.minorticks_off()
    axes.set_xlabel("steps", fontsize=9.5, labelpad=2)
    axes.set_ylim(0, 1.02)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    margins = [-point.margin for point in points if point.margin is not None]
    # of a model that gives no number there is none, and where all is broken nothing is left of it
    if len(margins) == len(points) and max(margins) > 0:
        loss = axes.twinx()
        axes.patch.set_facecolor("none")  # one of two axes in a place is always painted
        loss.plot(steps, margins, color=QUIET, linewidth=1.1, linestyle=(0, (4, 2)))
        loss.set_ylim(0, 1.05 * max(margins))
        loss.tick_params(length=2.5, width=0.6, labelsize=9.5)
        loss.spines["right"].set_visible(True)
        loss.set_ylabel("median margin left", fontsize=9.5, labelpad=3)
    return svg(figure, "robust accuracy and margin against the number of steps")

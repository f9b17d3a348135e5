"""Curves of a transfer: success against a swept parameter, or against the radius."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np

from robplug.referee import formats
from robplug.referee.figures import ACCENT, INK, QUIET, RULE, STYLE, canvas, svg
from robplug.referee.summary import Matrix, Summary

FEWEST_RADII = 3
"""Radii from which on success is drawn against them."""


@dataclass(frozen=True)
class Sweep:
    """Success of one attack on all pairs of a transfer, over a parameter or the radius.

    Attributes:
        title: which attack, under which threat.
        name: what is swept.
        points: (value, matrix, number of the attack), by value.
    """

    title: str
    name: str
    points: tuple[tuple[float, Matrix, int], ...]


def sweeps(summary: Summary) -> list[Sweep]:
    """Returns what a run has swept."""
    return [*_over_parameters(summary), *_over_radii(summary)]


def _over_parameters(summary: Summary) -> list[Sweep]:
    found = []
    for matrix in summary.matrices:
        families: dict[int, list[tuple[float, Matrix, int]]] = {}
        for number in sorted({entry.attack for entry in matrix.entries}):
            attack = summary.attack(number)
            if attack.swept and attack.at is not None:
                families.setdefault(attack.family, []).append((attack.at, matrix, number))
        for family, points in families.items():
            attack = summary.attack(family)
            label = re.sub(rf" {re.escape(attack.swept)}=\S+", "", attack.name)
            title = f"{label}, {formats.matrix(matrix, summary)}"
            found.append(Sweep(title, attack.swept, tuple(sorted(points, key=lambda point: point[0]))))
    return found


def _over_radii(summary: Summary) -> list[Sweep]:
    transfers: dict[tuple[object, ...], list[Matrix]] = {}
    for matrix in summary.matrices:
        threat = (matrix.number, matrix.dataset, matrix.norm, matrix.targeted, matrix.goal_rule)
        transfers.setdefault(threat, []).append(matrix)
    found = []
    for matrices in transfers.values():
        for number in sorted({entry.attack for matrix in matrices for entry in matrix.entries}):
            own = [matrix for matrix in matrices if any(entry.attack == number for entry in matrix.entries)]
            points = tuple((matrix.eps, matrix, number) for matrix in own if matrix.eps is not None)
            if len(points) >= FEWEST_RADII and not summary.attack(number).swept:
                title = f"{summary.attack(number).name}, {formats.transferred(own[0], summary)}"
                found.append(Sweep(title, "radius", points))
    return found


@matplotlib.rc_context(STYLE)
def draw(sweep: Sweep) -> str:
    """Draws success against what is swept: a thin line a pair, and the mean over white-box and black-box pairs.

    Returns:
        An ``<svg>`` element.
    """
    figure, axes = canvas(230, left=0.12, bottom=0.17, right=0.8, top=0.97)
    values = [value for value, _, _ in sweep.points]
    ends = []
    for white_box, colour, dashes, label in ((True, INK, (0, (4, 2)), "white box"), (False, ACCENT, "-", "black box")):
        lines = _lines(sweep, white_box)
        for line in lines:
            axes.plot(values, line, color=QUIET, linewidth=0.6, linestyle=dashes, alpha=0.7)
        if lines:
            mean = np.mean(lines, axis=0)
            axes.plot(values, mean, color=colour, linewidth=2, linestyle=dashes, marker="o", markersize=4)
            ends.append((float(mean[-1]), label, colour))
    for height, label, colour in _apart(ends):
        axes.text(1.02, height, label, transform=axes.get_yaxis_transform(), va="center", fontsize=9.5, color=colour)
    axes.set_xlabel(sweep.name, fontsize=9.5, labelpad=2)
    axes.set_xticks(values, [f"{value:.3g}" if sweep.name != "radius" else formats.radius(value) for value in values])
    axes.set_ylim(0, 1.02)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    return svg(figure, f"success against {sweep.name}")


def _lines(sweep: Sweep, white_box: bool) -> list[list[float]]:
    """Returns a line for each pair that has a share at every point."""
    _, first, number = sweep.points[0]
    pairs = [(one.source, one.victim) for one in first.entries if one.attack == number and one.white_box == white_box]
    lines = []
    for source, victim in pairs:
        entries = [matrix.entry(source, attack, victim) for _, matrix, attack in sweep.points]
        shares = [entry.success.value for entry in entries if entry is not None and entry.success.value is not None]
        if len(shares) == len(sweep.points):
            lines.append(shares)
    return lines


def _apart(ends: Sequence[tuple[float, str, str]], gap: float = 0.08) -> list[tuple[float, str, str]]:
    """Moves labels that would touch away from each other."""
    if len(ends) == 2 and abs(ends[0][0] - ends[1][0]) < gap:
        middle, sign = (ends[0][0] + ends[1][0]) / 2, 1 if ends[0][0] >= ends[1][0] else -1
        middle = min(max(middle, gap / 2), 1 - gap / 2)
        return [(middle + sign * gap / 2, *ends[0][1:]), (middle - sign * gap / 2, *ends[1][1:])]
    return list(ends)

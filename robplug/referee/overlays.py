"""Answers drawn over images: classes of pixels as colours, boxes as frames."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import colormaps

Array = np.ndarray[Any, Any]
SHARE = 0.65
"""Of a class's colour in a pixel that has one."""
CONFIDENT = 0.5
"""Score from which on a box is drawn."""


def drawn_over(image: Array, answer: Array) -> Array:
    """Returns an image (3, H, W) of values from 0 to 1 with an answer drawn over it.

    Args:
        image: (C, H, W), values from 0 to 1.
        answer: (H, W) classes, 0 the background; or (D, 6) boxes x1, y1, x2, y2, score, label, padded with label -1.
    """
    shown = np.array(image if len(image) == 3 else image[[0, 0, 0]], dtype=np.float64)
    if answer.shape == shown.shape[1:]:
        for label in np.unique(answer[answer > 0]):
            shown[:, answer == label] *= 1 - SHARE
            shown[:, answer == label] += SHARE * colour(int(label))[:, None]
        return shown
    if answer.ndim != 2 or answer.shape[1] != 6:
        return shown  # a run may come from somebody else
    height, width = shown.shape[1:]
    for x1, y1, x2, y2, score, label in answer[::-1]:  # the best is drawn last, above the others
        if label >= 0 and score >= CONFIDENT and not np.isnan([x1, y1, x2, y2]).any():
            left, right = (round(float(np.clip(x, 0, width - 1))) for x in (x1, x2 - 1))
            top, bottom = (round(float(np.clip(y, 0, height - 1))) for y in (y1, y2 - 1))
            for frame in (np.s_[[top, bottom], left : right + 1], np.s_[top : bottom + 1, [left, right]]):
                shown[(slice(None), *frame)] = colour(int(label))[:, None, None]
    return shown


def colour(label: int) -> Array:
    """Returns (3,) the colour of a class."""
    palette: Any = colormaps["tab10"].colors  # type: ignore[attr-defined]
    return np.array(palette[(label - 1) % len(palette)])

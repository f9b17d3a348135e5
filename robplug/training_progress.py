"""A line for each epoch of a training."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from rich.console import Console


class Progress:
    """Prints loss, accuracy, rate and time left after each epoch.

    Args:
        epochs: epochs of the whole training.
    """

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self.console = Console(stderr=True)
        self.last = time.perf_counter()

    def show(self, record: Mapping[str, Any], samples: int) -> None:
        """Prints the line of an epoch.

        Args:
            record: as in ``train.json``.
            samples: number of samples that were trained on.
        """
        now = time.perf_counter()
        seconds, self.last = max(now - self.last, 1e-9), now
        left = timedelta(seconds=round(seconds * (self.epochs - record["epoch"])))
        seen = [_show(name, value) for name, value in record.items() if name != "epoch"]
        parts = [
            f"epoch {record['epoch']:>3}/{self.epochs}",
            *seen,
            f"{samples / seconds:,.0f} samples/s",
            f"{left} left",
        ]
        self.console.print("  ".join(parts), highlight=False, soft_wrap=True)


def say_finished() -> None:
    """Prints that nothing is left to be trained."""
    Console(stderr=True).print("finished already: nothing is trained")


def _show(name: str, value: float) -> str:
    text = f"{100 * value:5.1f} %" if name in ("accuracy", "held_out") else f"{value:.4f}"
    return f"{name.replace('_', ' ')} {text}"

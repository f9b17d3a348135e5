"""What a run would do: its cells, how much of each is done, and the passes that are left."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from robplug.referee.cells import Cell
from robplug.referee.jobs import prepare
from robplug.referee.plan import load_plan
from robplug.referee.store import CellStore
from robplug.registry import Registry

STEPS = ("steps", "max_iter", "iterations", "queries", "n_queries", "iter", "draws")
"""Names of parameters that count forward passes, over all libraries."""
REPEATS = ("restarts", "n_restarts", "nb_restarts", "num_random_init", "nb_random_init", "binary_search_steps")
"""Names of parameters that repeat them."""


@dataclass(frozen=True)
class Outlook:
    """One cell of a plan that has not been run, or not wholly.

    Attributes:
        key: where it is stored.
        cell: what it is.
        samples: how many it has.
        done: how many of them are stored.
        forwards: estimated forward passes of the rest, in samples, or None.
        backwards: likewise backward.
    """

    key: str
    cell: Cell
    samples: int
    done: int
    forwards: int | None
    backwards: int | None

    def columns(self) -> tuple[str, ...]:
        """Returns the columns of ``robplug run --dry-run``."""
        cell, threat = self.cell, self.cell.threat
        eps = "minimal" if threat.eps is None else f"{threat.eps:.4g}"
        passes = ("?" if count is None else f"{count:,}" for count in (self.forwards, self.backwards))
        what = f"{threat.norm} {eps}{' targeted' if threat.targeted else ''}"
        target = " \u2192 ".join(name for name in (cell.source_name, cell.target.name) if name)
        return (target, cell.label, cell.mode, what, f"{self.done:,}/{self.samples:,}", *passes)


def outlook(plan: str | Path, registry: Registry, out: str | Path | None = None) -> list[Outlook]:
    """Returns what running a plan would do; writes nothing.

    Raises:
        PlanError: the plan cannot be run.
    """
    settings, where = load_plan(plan)
    rows = []
    for job in prepare(settings, registry, where):
        store = CellStore(Path(out or settings.out) / "cells" / job.key[:16])
        record = store.record() or {"chunks": []}
        done = sum(chunk["samples"] for chunk in record["chunks"])
        passes = _passes(job.cell, job.target.eot) if job.source is None else 1
        left = len(job.dataset) - done
        forwards = None if passes is None and left else (passes or 0) * left
        backwards = forwards if job.cell.spec.needs == "gradients" and job.source is None else 0
        rows.append(Outlook(job.key, job.cell, len(job.dataset), done, forwards, backwards))
    return rows


def _passes(cell: Cell, eot: int) -> int | None:
    """Estimates forward passes per sample from the parameters in force."""
    steps = [cell.params[name] for name in STEPS if isinstance(cell.params.get(name), int)]
    if not steps:
        return 1 if not cell.params or cell.spec.canonical == "fgsm" else None
    repeats = [cell.params[name] for name in REPEATS if isinstance(cell.params.get(name), int)]
    product = int(steps[0])
    for repeat in repeats:
        product *= max(int(repeat), 1)
    return product * eot

"""Probes: a few cheap measurements of each model at the end of a run, stored beside its cells.

A model is probed once a data set, and once a norm at the plan's largest radius, on the first samples that it classifies
correctly. What a model does in a probe that fails is written down and stops nothing.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robplug.errors import RobplugError
from robplug.referee.guard import undisturbed
from robplug.referee.heartbeat import Heartbeat
from robplug.referee.jobs import Job
from robplug.referee.plan import Plan
from robplug.referee.probe_measures import OF_MODEL, OF_THREAT, Columns, NotMeasurableError, Part
from robplug.referee.store import Store
from robplug.rng import Rng

VERSION = 1
"""Raised when a measure changes, so that old probes are not taken for new ones."""
SEED = 0
PIXEL_NORMS = ("linf", "l2", "l1", "l0")
Classes = Callable[[Job, range], Tensor]


@dataclass(frozen=True)
class PlannedProbe:
    """A probe that belongs to a plan.

    Attributes:
        job: a cell of the model and the data.
        norm: of the threat; None of a probe of the model alone.
        eps: the plan's largest radius, or None.
        samples: how many samples at most.
        chunk: how many at once; what a random model draws depends on it.
    """

    job: Job
    norm: str | None
    eps: float | None
    samples: int
    chunk: int

    @property
    def key(self) -> str:
        """SHA-256 of all that changes what is measured."""
        identity, target = self.job.identity, self.job.target
        parts = [VERSION, identity.weights, identity.model_source, identity.data, target.bounds, target.offers]
        parts += [target.stochastic, target.eot, target.draws, self.norm, self.eps, self.samples, self.chunk]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def entry(self) -> dict[str, Any]:
        """What run.json has of it."""
        name, data = self.job.cell.target.name, self.job.identity.data
        return {"key": self.key, "target": name, "data": data, "norm": self.norm, "eps": self.eps}


def plan_probes(jobs: Sequence[Job], plan: Plan) -> list[PlannedProbe]:
    """Returns the probes of a plan: of each attacked model, and of it under each pixel norm with a radius."""
    radii: dict[str, list[float]] = {}
    for threat in plan.threats:
        radii.setdefault(threat.norm, []).extend(eps for eps in threat.eps if eps is not None)
    found: dict[tuple[str, str, str | None], PlannedProbe] = {}
    for job in jobs if plan.probes else ():
        if job.target.task == "classification" and job.source is None:
            norm = job.cell.threat.norm
            wanted: list[tuple[str | None, float | None]] = [(None, None)]
            wanted += [(norm, max(radii[norm]))] if norm in PIXEL_NORMS and radii[norm] else []
            for name, eps in wanted:
                place = (job.cell.target.name, job.identity.data, name)
                found.setdefault(place, PlannedProbe(job, name, eps, plan.probes, plan.chunk))
    return list(found.values())


def run_probe(probe: PlannedProbe, store: Store, classes: Classes) -> None:
    """Measures and stores, unless that was done before.

    Args:
        probe: what is to be measured.
        store: of the run.
        classes: gives the classes that the model predicts for clean samples.

    Raises:
        StoreError: it cannot be written.
    """
    if store.probe_path(probe.key).is_file():
        return
    start = time.perf_counter()
    ids = _right(probe, classes)
    columns: dict[str, list[float | None]] = {}
    failed: dict[str, str] = {}
    heartbeat = Heartbeat(store.probe_path(probe.key).with_suffix(""))
    alive = heartbeat.begin()
    for number, (name, measure) in enumerate((OF_MODEL if probe.norm is None else OF_THREAT).items()):
        heartbeat.beat(number)
        try:
            if not alive:
                raise NotMeasurableError("killed twice at the same point")
            columns |= {f"{name}.{key}": values for key, values in _measure(measure, probe, ids).items()}
        except Exception as error:  # the user's model may raise anything
            kind = "" if isinstance(error, RobplugError) else f"could not run: {type(error).__name__}: "
            failed[name] = " ".join(f"{kind}{error}".split())[:300]
    store.write_probe(
        probe.key,
        {
            "version": VERSION,
            **probe.entry,
            "torch": torch.__version__,
            "seconds": round(time.perf_counter() - start, 6),
            "samples": ids,
            "y": probe.job.dataset.y[ids].tolist(),
            "columns": columns,
            "failed": failed,
        },
    )
    heartbeat.end()


def _right(probe: PlannedProbe, classes: Classes) -> list[int]:
    """Returns the first samples that the model classifies correctly."""
    found: list[int] = []
    for samples in probe.job.chunks(probe.chunk):
        right = classes(probe.job, samples) == probe.job.dataset.y[samples.start : samples.stop]
        found += [sample for sample, is_right in zip(samples, right.tolist(), strict=True) if is_right]
        if len(found) >= probe.samples:
            break
    return found[: probe.samples]


def _measure(measure: Callable[[Part], Columns], probe: PlannedProbe, ids: list[int]) -> dict[str, list[float | None]]:
    """Measures chunk by chunk, since a plan chooses its chunks by the memory there is."""
    if not ids:
        raise NotMeasurableError("no sample is classified correctly")
    job = probe.job
    found: dict[str, list[float | None]] = {}
    for start in range(0, len(ids), probe.chunk):
        own = ids[start : start + probe.chunk]
        x = job.dataset.x[own].to(device=job.target.device, dtype=job.target.sample_dtype)
        y = job.dataset.y[own].to(job.target.device)
        with undisturbed(job.target, Rng(SEED, own).batch_seed()):
            columns = measure(Part(job.target, x, y, Rng(SEED, own), job.norm, probe.eps or 0.0))
        for name, values in columns.items():
            found.setdefault(name, []).extend(_plain(value) for value in values.tolist())
    return found


def _plain(value: float) -> float | None:
    """Returns what JSON can hold."""
    number = float(value)
    return number if abs(number) < float("inf") else None  # also None for nan

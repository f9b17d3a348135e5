"""Running a plan: cells in their order, chunk by chunk, each finished chunk on disk before the next starts."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from robplug.interrupt import deferred_interrupt
from robplug.isolation import cpu_threads, seeded_globals
from robplug.referee.guard import Assignment, Outcome, run_guarded
from robplug.referee.heartbeat import Heartbeat
from robplug.referee.jobs import Job, goals, prepare
from robplug.referee.kept import found_elsewhere, keep_answers, keep_samples, keep_trace
from robplug.referee.plan import Plan, load_plan
from robplug.referee.precision import has_precision, precision
from robplug.referee.probes import plan_probes, run_probe
from robplug.referee.records import cell_record, provenance
from robplug.referee.results import Results
from robplug.referee.store import Store
from robplug.referee.verify import Batch, Verdicts, answers, verify
from robplug.registry import Registry
from robplug.rng import Rng
from robplug.tasks import task_of
from robplug.types import ThreatModel

PERMUTING = 1 << 33
"""The restart whose streams permute rows and columns."""
STOPPING = "stopping after this chunk is stored; Ctrl-C again stops now"


class Progress(Protocol):
    """Hears how a run goes."""

    def begin(self, samples: int) -> None:
        """The plan has so many samples to attack, over all cells."""
        ...

    def advance(self, label: str, samples: int, done_before: bool) -> None:
        """So many samples of the cell with this label are finished, perhaps by an earlier run."""
        ...


class _Silent:
    def begin(self, samples: int) -> None: ...

    def advance(self, label: str, samples: int, done_before: bool) -> None: ...


class Interrupted(KeyboardInterrupt):
    """Ctrl-C: what was finished is stored.

    Attributes:
        path: the run directory.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(f"stopped; {path} has all finished chunks")
        self.path = path


def run_plan(
    plan: Mapping[str, Any] | str | Path,
    registry: Registry,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Results:
    """Runs a plan, or what is left of it; see `robplug.evaluate`.

    Raises:
        PlanError: before anything has run.
        StoreError: the run directory cannot be used.
        Interrupted: Ctrl-C; the chunk under way was finished and stored.
    """
    settings, where = load_plan(plan)
    hear = progress or _Silent()
    with cpu_threads(settings.threads):
        jobs = prepare(settings, registry, where)
    store = Store(out or settings.out)
    probes = plan_probes(jobs, settings)
    with store.locked(), cpu_threads(settings.threads), deferred_interrupt(STOPPING) as asked:
        entries = {"cells": [job.key for job in jobs], "probes": [probe.entry for probe in probes]}
        store.write_run({**provenance(settings, where), **entries})
        hear.begin(sum(len(job.dataset) for job in jobs))
        clean = CleanAnswers(settings.batch_size)
        for number, job in enumerate(jobs):
            for chunk in run_cell(job, number, settings, store, clean):
                name = " \u2192 ".join(one for one in (job.cell.source_name, job.cell.target.name) if one)
                hear.advance(f"{name}: {job.cell.label}", chunk.samples, chunk.done_before)
                if asked():
                    raise Interrupted(store.path)
        for probe in probes:
            hear.advance(f"probing {probe.job.cell.target.name}", 0, done_before=False)
            run_probe(probe, store, clean.of)
            if asked():
                raise Interrupted(store.path)
    return Results(store.path)


class CleanAnswers:
    """The model's answers for clean samples; kept, since every cell of a target and a data set needs the same.

    Args:
        batch_size: samples per forward pass.
    """

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._known: dict[tuple[str, str, range, int], Tensor] = {}

    def of(self, job: Job, samples: range) -> Tensor:
        """Returns the answers, on the CPU."""
        place = (job.cell.target.name, job.identity.data, samples, job.cell.seed)
        if place not in self._known:
            seed = _judge_seed(job, samples)
            job.target.reset(seed)
            with seeded_globals(seed):
                x = _samples(job, samples)
                self._known[place] = answers(task_of(job.target), job.target, x, self._batch_size).cpu()
        return self._known[place]


@dataclass(frozen=True)
class _Chunk:
    samples: int
    done_before: bool


def run_cell(job: Job, number: int, plan: Plan, run: Store, clean: CleanAnswers) -> Iterator[_Chunk]:
    """Runs the chunks of a cell that are not finished; yields each chunk."""
    store = run.cell(job.key)
    finished = store.finished()
    if job.keep == "all" and finished and not all(store.has_adversarials(index) for index in finished):
        store.forget()  # it was run when nobody wanted all its samples, and cannot give them now
        finished = set()
    record = cell_record(job, number, store)
    store.write_record(record)
    chunks = job.chunks(plan.chunk)
    for index, samples in enumerate(chunks):
        if index not in finished:
            done = _run_chunk(job, index, samples, clean.of(job, samples), plan, run)
            record["chunks"] = [*record["chunks"], done]
            store.write_record(record)
            Heartbeat(store.heartbeat_path(index)).end()
        lacking = job.target.task == "detection" and not has_precision(record)
        if len(record["chunks"]) == len(chunks) and (record["state"] != "finished" or lacking):
            if job.target.task == "detection":
                record["quality"] = precision(store.path, job.dataset.labels("detection"))
            record["state"] = "finished"
            store.write_record(record)
        yield _Chunk(len(samples), index in finished)


def _run_chunk(job: Job, index: int, samples: range, answer: Tensor, plan: Plan, run: Store) -> dict[str, Any]:
    """Attacks one chunk, or takes what was found on the source; judges and stores it; returns its record."""
    target, store = job.target, run.cell(job.key)
    batch = _batch(job, samples, answer)
    threat = replace(job.cell.threat, bounds=target.bounds)
    heartbeat = Heartbeat(store.heartbeat_path(index))
    if not heartbeat.begin():
        outcome = Outcome(error="killed twice at the same point (out of memory, or a crash in native code?)")
    elif job.source is not None:
        kept = [run.cell(one.key).tensors("adversarials", index, ("sample", "x", "x_adv")) for one in job.sources]
        order = Rng(job.cell.seed, list(samples), restart=PERMUTING) if job.cell.permuted else None
        batch, outcome = found_elsewhere(batch, kept, target.bounds, order)
    else:
        outcome = _attack(job, batch, threat, heartbeat)
    heartbeat.survived()
    found = _judge(job, batch, threat, outcome, plan.batch_size)
    store.write_rows(index, found.rows)
    if outcome.trace:
        store.write_text(f"traceback-{index:05d}.txt", outcome.trace)
    keep_answers(index, batch, found, store)
    keep_trace(index, batch, outcome, store)
    keep_samples(job.keep, index, batch, found, outcome, store)
    return {
        "index": index,
        "samples": len(samples),
        "seconds": round(outcome.seconds, 6),
        "forwards": outcome.forwards,
        "backwards": outcome.backwards,
        "notes": outcome.notes,
    }


def _judge(job: Job, batch: Batch, threat: ThreatModel, outcome: Outcome, batch_size: int) -> Verdicts:
    """Judges a chunk; what cannot be judged (a witness that is none, no memory) becomes rows with status error."""
    seed = _judge_seed(job, batch.ids)
    job.target.reset(seed)
    with seeded_globals(seed):
        try:
            return verify(job.target, job.norm, threat, batch, outcome, batch_size)
        except Exception as error:
            outcome.error = " ".join(f"{type(error).__name__} in verification: {error}".split())[:300]
            outcome.trace = traceback.format_exc()
            return verify(job.target, job.norm, threat, batch, outcome, batch_size)


def _judge_seed(job: Job, samples: Sequence[int]) -> int:
    """Returns the seed of a stochastic target's verdicts on a chunk, which no attack can guess by chance."""
    return Rng(job.cell.seed, [len(samples), *samples], restart=1).batch_seed() % (1 << 31)


def _samples(job: Job, samples: Sequence[int]) -> Tensor:
    """Returns clean samples, a copy that nobody else holds."""
    x = job.dataset.x[samples[0] : samples[-1] + 1]
    return x.to(device=job.target.device, dtype=job.target.sample_dtype, copy=True)


def _batch(job: Job, samples: range, answer: Tensor) -> Batch:
    device = job.target.device
    x = _samples(job, samples)
    y = job.dataset.labels(job.target.task)[samples.start : samples.stop].to(device)
    goal = goals(job, list(samples), x, y) if job.cell.threat.targeted else None
    return Batch(list(samples), x, y, goal, answer.to(device), task_of(job.target))


def _attack(job: Job, batch: Batch, threat: ThreatModel, heartbeat: Heartbeat) -> Outcome:
    attacked = batch.attacked
    if not bool(attacked.any()):
        return Outcome()
    ids = [sample for sample, wanted in zip(batch.ids, attacked.tolist(), strict=True) if wanted]
    cell = job.cell
    return run_guarded(
        Assignment(
            attack=job.attack,
            target=job.target,
            norm=job.norm,
            threat=threat,
            x=batch.x[attacked],
            y=batch.y[attacked],
            y_goal=None if batch.y_goal is None else batch.y_goal[attacked],
            rng=Rng(cell.seed, ids),
            timeout_s=cell.timeout_s,
            beat=heartbeat.beat,
        )
    )

"""Running an attack that is not trusted.

The attack gets the model behind a shell that counts, keeps time and watches; the model and the global random numbers
are afterwards what they were, and what had changed is noted. What the attack returns is judged elsewhere (verify.py).
"""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from robplug.isolation import ModuleState, global_numbers, seeded_globals
from robplug.norms import Norm
from robplug.rng import Rng
from robplug.targets import Target, evaluation_mode
from robplug.types import Attack, Perturbed, ThreatModel


class AttackTimeoutError(BaseException):
    """The time limit has passed. Not an Exception: an attack that catches everything must not catch this."""


@dataclass
class Outcome:
    """What came of running an attack on one chunk.

    Attributes:
        perturbed: what it returned, unjudged; None if it raised.
        error: the exception in one line, or "".
        trace: its traceback.
        forwards: rows sent forward.
        backwards: rows sent backward.
        seconds: wall clock.
        silent: (N,) bool, an iterate of the sample itself was a valid adversarial example.
        notes: what the attack changed and must not have changed.
    """

    perturbed: Perturbed | None = None
    error: str = ""
    trace: str = ""
    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0
    silent: Tensor | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Watch:
    """Sees every forward pass of an attack on one batch.

    A forward of as many rows as the batch is compared with it row by row: a row inside the ball around its sample that
    the model gets wrong is an adversarial example for that sample, whatever the attack meant by it. Other forwards are
    counted only.

    Attributes:
        x: the clean batch.
        norm: measures the distance.
        threat: says what is allowed.
        labels: (N,) true classes, or goals of a targeted threat; of other tasks true labels, and nothing is compared.
        deadline: on the monotonic clock.
        beat: called with the number of forward calls so far.
        draws: passes of the real model for each that the attack asks for.
    """

    x: Tensor
    norm: Norm
    threat: ThreatModel
    labels: Tensor
    deadline: float
    beat: Callable[[int], None]
    draws: int = 1
    forwards: int = 0
    backwards: int = 0
    calls: int = 0
    silent: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.silent = torch.zeros(len(self.x), dtype=torch.bool, device=self.x.device)

    def before(self, x: Tensor) -> None:
        """Counts a forward pass and keeps the time limit."""
        if time.monotonic() > self.deadline:
            raise AttackTimeoutError
        self.calls += 1
        self.beat(self.calls)
        self.forwards += len(x) * self.draws

    def after(self, x: Tensor, logits: Tensor) -> None:
        """Looks for success, and counts the backward passes that will come through these logits."""
        if logits.requires_grad:
            logits.register_hook(self._count_backward)
        if self.labels.dim() == 1 and x.shape == self.x.shape and self.threat.eps is not None:
            self._look(x.detach(), logits.detach())

    def _count_backward(self, gradient: Tensor) -> None:
        self.backwards += len(gradient) * self.draws

    def _look(self, x: Tensor, logits: Tensor) -> None:
        fresh = ((logits.argmax(1) == self.labels) == self.threat.targeted) & ~self.silent
        if not bool(fresh.any()):
            return
        low, high = self.threat.bounds
        rows, clean = x[fresh], self.x[fresh]
        values = rows.flatten(1)
        inside = (values >= low).all(1) & (values <= high).all(1)
        allowed = self.norm.allowed(self.threat.eps or 0.0, values.shape[1], self.threat.bounds)
        self.silent[fresh] = inside & (self.norm.distance(clean, rows.to(clean.dtype)) <= allowed)


class Shell(nn.Module):
    """What an attack sees of the model: a plain module that counts, watches and keeps to what the target offers."""

    def __init__(self, target: Target, watch: Watch) -> None:
        super().__init__()
        self.module = target.module
        self._target = target
        self._watch = watch

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits; x is cast to the model's dtype (some attacks feed float64)."""
        self._watch.before(x)
        logits = self._target.logits(x.to(self._target.dtype))
        if self._target.offers != "gradients":
            logits = logits.detach()
        if self._target.offers == "labels":
            logits = torch.nn.functional.one_hot(logits.argmax(1), logits.shape[1]).to(logits.dtype)
        self._watch.after(x, logits)
        return logits


class DetectorShell(Shell):
    """What an attack sees of a detector: its methods, each counted as a forward pass."""

    @property
    def nms_threshold(self) -> float:
        """That of the detector; what an attack has set is put back afterwards."""
        return self._target.module.nms_threshold  # type: ignore[return-value]

    @nms_threshold.setter
    def nms_threshold(self, value: float) -> None:
        self._target.module.nms_threshold = value  # type: ignore[assignment]

    def proposals(self, x: Tensor) -> Any:
        """Returns the detector's proposals."""
        self._watch.before(x)
        found = self._target.proposals(x)
        self._watch.after(x, found.logits)
        return found

    def rescore(self, x: Tensor, proposals: Any) -> Tensor:
        """Returns the logits of the same proposals in other images."""
        self._watch.before(x)
        logits = self._target.rescore(x, proposals)
        self._watch.after(x, logits)
        return logits

    def detections(self, x: Tensor) -> Tensor:
        """Returns the detector's answers."""
        self._watch.before(x)
        return self._target.detections(x)

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the detector's losses."""
        self._watch.before(x)
        losses = self._target.losses(x, y)
        self._watch.after(x, losses)
        return losses


@dataclass(frozen=True)
class Assignment:
    """An attack on one batch.

    Attributes:
        attack: what is to be run.
        target: the real model.
        norm: of the threat.
        threat: with the target's bounds.
        x: clean samples.
        y: true labels.
        y_goal: (N,) goals, or None.
        rng: a stream per sample.
        timeout_s: time limit, or None.
        beat: called with the number of forward calls so far.
    """

    attack: Attack
    target: Target
    norm: Norm
    threat: ThreatModel
    x: Tensor
    y: Tensor
    y_goal: Tensor | None
    rng: Rng
    timeout_s: float | None = None
    beat: Callable[[int], None] = lambda calls: None


def run_guarded(job: Assignment) -> Outcome:
    """Runs an attack; whatever it does, an Outcome comes back (but for Ctrl-C, which passes)."""
    deadline = time.monotonic() + (job.timeout_s or float("inf"))
    labels = job.y if job.y_goal is None else job.y_goal
    watch = Watch(job.x.clone(), job.norm, job.threat, labels.clone(), deadline, job.beat, job.target.eot)
    seen = job.target.for_attack()
    shell = dataclasses.replace(seen, module=(DetectorShell if seen.task == "detection" else Shell)(seen, watch))
    outcome = Outcome()
    with undisturbed(job.target, job.rng.batch_seed()) as outcome.notes:
        start = time.perf_counter()
        try:
            _call(job, shell, outcome, deadline)
        finally:
            outcome.seconds = time.perf_counter() - start
    outcome.forwards, outcome.backwards = watch.forwards, watch.backwards
    outcome.silent = None if job.target.stochastic or job.y.dim() > 1 else watch.silent
    return outcome


@contextmanager
def undisturbed(target: Target, seed: int) -> Iterator[list[str]]:
    """Inside, the model is in eval mode, has no gradients of its parameters, and draws the numbers of a seed.

    Afterwards model and global random numbers are what they were, and the list yielded has what had changed.
    """
    notes: list[str] = []
    frozen = [parameter for parameter in target.module.parameters() if parameter.requires_grad]
    with evaluation_mode(target.module), seeded_globals(seed):
        for parameter in frozen:
            parameter.requires_grad_(False)
        before, numbers = ModuleState(target.module, strict=True), global_numbers()
        try:
            target.reset(seed % (1 << 31))
            yield notes
        finally:
            notes += [f"changed {what}" for what in before.restore()]
            if global_numbers() != numbers:
                notes.append("used or reseeded the global random numbers")
            for parameter in frozen:
                parameter.requires_grad_(True)


def _call(job: Assignment, shell: Target, outcome: Outcome, deadline: float) -> None:
    try:
        x, y = job.x.clone(), job.y.clone()
        with torch.enable_grad():  # which also puts the mode back that the attack has left
            outcome.perturbed = job.attack.run(shell, x, y, job.threat, job.rng, y_goal=job.y_goal)
        if time.monotonic() > deadline:
            raise AttackTimeoutError
        if not torch.equal(x, job.x):
            outcome.notes.append("changed the samples it was given")
    except AttackTimeoutError:
        outcome.perturbed = None
        outcome.error = f"timeout: ran past timeout_s={job.timeout_s}"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # out of memory, SystemExit, assertion: all become rows with status error
        outcome.error = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        outcome.trace = traceback.format_exc()

"""Judging what an attack returned: nothing is taken from it but x_adv and witness, and all is measured again."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from robplug.norms import Measuring, Norm
from robplug.referee.guard import Outcome
from robplug.targets import Target, evaluation_mode
from robplug.tasks import Classification, Task, together
from robplug.types import SampleResult, Status, ThreatModel

PLAIN = (Tensor, nn.Parameter)
"""What an attack may return: a subclass could answer the referee's own arithmetic as it likes."""
BOX_TOLERANCE = 2.0**-23
"""One unit in the last place of float32 at the larger bound: what scaling to other bounds and back may add."""
NOTHING = "has no labelled foreground, so there is nothing to attack"
UNCHANGED = "came back unchanged (distance 0) and counts as robust"


@dataclass(frozen=True)
class Batch:
    """A chunk of samples as the referee knows them.

    Attributes:
        ids: indices in the data set.
        x: clean samples.
        y: true labels; their form depends on the task.
        y_goal: (N,) goals, or None.
        answer: the model's answers for x.
        task: how answers are judged.
        made: (N,) bool, where the adversarial samples were made elsewhere: those that there are.
    """

    ids: list[int]
    x: Tensor
    y: Tensor
    y_goal: Tensor | None
    answer: Tensor
    task: Task = field(default_factory=Classification)
    made: Tensor | None = None

    @cached_property
    def prediction(self) -> Tensor:
        """(N,) the codes of the clean answers, such as the classes."""
        return self.task.code(self.answer, self.y)

    @cached_property
    def attacked(self) -> Tensor:
        """(N,) bool: the samples worth attacking, such as those classified correctly."""
        worth = self.task.attackable(self.prediction, self.y)
        return worth if self.made is None else worth & self.made


@dataclass(frozen=True)
class _Judged:
    """Measurements of the attacked samples, one entry a sample."""

    prediction: Tensor
    distance: Tensor
    fault: list[str]
    measures: dict[str, Tensor] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    answer: Tensor | None = None


@dataclass(frozen=True)
class Verdicts:
    """What `verify` found.

    Attributes:
        rows: a row a sample.
        answer: of the attacked samples the model's answers for x_adv, or None where none could be asked for.
    """

    rows: list[SampleResult]
    answer: Tensor | None = None


def answers(task: Task, target: Target, x: Tensor, batch_size: int) -> Tensor:
    """Returns the model's answers for x in eval mode, batch by batch."""
    with evaluation_mode(target.module):
        parts = [task.answer(target, part) for part in x.split(batch_size)]
    return together(parts) if parts else task.answer(target, x)


def verify(
    target: Target, norm: Norm, threat: ThreatModel, batch: Batch, outcome: Outcome, batch_size: int
) -> Verdicts:
    """Judges each sample of a chunk.

    Args:
        target: the real model, not the shell that the attack saw.
        norm: of the threat.
        threat: with the target's bounds.
        batch: the chunk.
        outcome: what the guard brought back for ``batch.attacked``.
        batch_size: samples per forward pass.
    """
    attacked = batch.attacked
    x = batch.x[attacked]
    judged = None if outcome.error or not len(x) else _judge(target, norm, threat, batch, outcome, batch_size)
    place = (attacked.cumsum(0) - 1).tolist()
    wanted = batch.task.wanted(batch.y)
    clean = _by_row("clean", batch.task.scores(batch.answer, batch.y), len(batch.ids))
    rows = []
    for i, sample in enumerate(batch.ids):
        goal = -1 if batch.y_goal is None else int(batch.y_goal[i])
        base = {"sample": sample, "y": int(wanted[i]), "y_goal": goal, "prediction": int(batch.prediction[i])}
        if bool(attacked[i]) and judged is not None:
            row = _verdict(base, place[i], judged, norm, threat, x, outcome)
        elif bool(attacked[i]):
            row = _row(base, "error", note=outcome.error)
        else:
            row = _row(base, "unattacked", note=NOTHING if batch.made is None else "")
        if base["prediction"] != base["y"]:
            row = replace(row, status="misclassified", note="" if row.status == "unattacked" else row.note)
        elif row.status == "robust" and row.distance == 0 and not row.silent and batch.made is None and threat.eps != 0:
            row = replace(row, note=UNCHANGED)
        rows.append(replace(row, scores={**clean[i], **row.scores}))
    return Verdicts(rows, None if judged is None else judged.answer)


def _by_row(prefix: str, scores: dict[str, Tensor], count: int) -> list[dict[str, float]]:
    """Returns a dict a row of those scores that are numbers."""
    columns = {f"{prefix}.{name}": values.tolist() for name, values in scores.items()}
    return [{name: row[i] for name, row in columns.items() if not math.isnan(row[i])} for i in range(count)]


def _judge(target: Target, norm: Norm, threat: ThreatModel, batch: Batch, outcome: Outcome, batch_size: int) -> _Judged:
    """Measures answer and distance of every sample that can be measured, and says why of the others."""
    x, y = batch.x[batch.attacked], batch.y[batch.attacked]
    count = len(x)
    prediction = torch.full((count,), -1, dtype=torch.int64)
    distance = torch.full((count,), float("nan"), dtype=torch.float64)
    fault = _fault_of_batch(outcome.perturbed, x)
    if fault:
        return _Judged(prediction, distance, [fault] * count)
    assert outcome.perturbed is not None  # _fault_of_batch has looked
    x_adv = outcome.perturbed.x_adv.detach().to(x.device)
    faults = _faults(x_adv, threat.bounds)
    finite = x_adv.flatten(1).isfinite().all(1)
    if not bool(finite.any()):
        return _Judged(prediction, distance, faults)
    # every row is asked for, so that a stochastic model's draws for one do not depend on the others
    whole = torch.where(finite.view(-1, *[1] * (x.dim() - 1)), x_adv, x)
    answer = answers(batch.task, target, whole, batch_size)
    prediction = torch.where(finite, batch.task.code(answer, y), -1).cpu()
    scores = {name: values.cpu() for name, values in batch.task.scores(answer, y).items()}
    witness = outcome.perturbed.witness if type(outcome.perturbed.witness) in PLAIN else None
    found = None if witness is None else witness.detach().to(x.device)[finite]
    distance[finite.cpu()] = norm.distance(x[finite], x_adv[finite], found).cpu()
    measures = {}
    if isinstance(norm, Measuring):
        for name, values in norm.measures(x[finite], x_adv[finite], found).items():
            measures[name] = torch.full_like(distance, float("nan"))
            measures[name][finite.cpu()] = values.double().cpu()
            measures[name][~distance.isfinite()] = float("nan")  # the witness was not believed
    for row in ((prediction < 0) & finite.cpu()).nonzero().flatten().tolist():
        faults[row] = faults[row] or "makes the model give no number"
    return _Judged(prediction, distance, faults, measures, scores, answer)


def has_values(tensor: Any) -> bool:
    """Whether something is a plain tensor of numbers that lie in memory one by one, and so can be read and stored."""
    if type(tensor) not in PLAIN or tensor.is_nested or tensor.layout != torch.strided:
        return False
    return tensor.device.type != "meta" and not (tensor.is_quantized or tensor.is_complex())


def _fault_of_batch(returned: Any, x: Tensor) -> str:
    if not hasattr(returned, "x_adv"):
        return f"run returned a {type(returned).__name__}, expected a Perturbed"
    x_adv = returned.x_adv
    if type(x_adv) not in PLAIN or x_adv.is_nested:
        kind = type(x_adv).__name__
        return f"returned {'a nested' if kind in ('Tensor', 'Parameter') else kind} instead of a plain tensor"
    if x_adv.shape != x.shape:
        return f"returned shape {tuple(x_adv.shape)} instead of {tuple(x.shape)}"
    if x_adv.layout != torch.strided or x_adv.device.type == "meta":
        return f"returned a tensor without values ({x_adv.layout}, {x_adv.device})"
    if x_adv.dtype != x.dtype:
        return f"returned dtype {x_adv.dtype} instead of {x.dtype}"
    return ""


def _faults(x_adv: Tensor, bounds: tuple[float, float]) -> list[str]:
    slack = BOX_TOLERANCE * max(abs(bounds[0]), abs(bounds[1]))
    flat = x_adv.flatten(1).double()
    finite = flat.isfinite().all(1).tolist()
    low, high = flat.amin(1).tolist(), flat.amax(1).tolist()
    return [
        "is not finite"
        if not is_finite
        else f"leaves the bounds {bounds}: values from {lowest:.9g} to {highest:.9g}"
        if lowest < bounds[0] - slack or highest > bounds[1] + slack
        else ""
        for is_finite, lowest, highest in zip(finite, low, high, strict=True)
    ]


def _verdict(
    base: dict[str, int], i: int, judged: _Judged, norm: Norm, threat: ThreatModel, x: Tensor, outcome: Outcome
) -> SampleResult:
    distance = float(judged.distance[i])
    fault, excess = judged.fault[i], 0.0
    if not fault and threat.eps is not None:
        allowed = norm.allowed(threat.eps, x[0].numel(), threat.bounds)
        if not distance <= allowed:
            excess = distance - allowed
            fault = f"leaves the ball: {threat.norm} distance {distance:.9g} > {allowed:.9g}"
    elif not fault and not distance < float("inf"):
        fault = f"has no finite {threat.norm} distance"
    prediction_adv = int(judged.prediction[i])
    reached = prediction_adv == base["y_goal"] if threat.targeted else prediction_adv != base["y"]
    status: Status = "invalid" if fault else "broken" if reached else "robust"
    claim = _claim(outcome, i)
    silent = status == "robust" and outcome.silent is not None and bool(outcome.silent[i])
    alone = outcome.perturbed is not None and len(x) == 1  # only then do the counts belong to one sample
    return _row(
        base,
        status,
        prediction_adv=prediction_adv,
        distance=distance,
        excess=excess,
        claim=claim,
        silent=silent,
        forwards=outcome.forwards if alone else None,
        backwards=outcome.backwards if alone else None,
        note=fault,
        measures={name: float(values[i]) for name, values in judged.measures.items()},
        scores={}
        if fault
        else _by_row("adv", {name: values[i : i + 1] for name, values in judged.scores.items()}, 1)[0],
    )


def _claim(outcome: Outcome, i: int) -> bool | None:
    claim = getattr(outcome.perturbed, "claim", None)
    usable = isinstance(claim, Tensor) and claim.dim() == 1 and len(claim) > i
    return bool(claim[i]) if usable and claim is not None else None


def _row(base: dict[str, int], status: Status, **values: Any) -> SampleResult:
    columns: dict[str, Any] = {
        **base,
        "prediction_adv": -1,
        "distance": float("nan"),
        "excess": 0.0,
        "claim": None,
        "silent": False,
        "forwards": None,
        "backwards": None,
        "note": "",
    }
    return SampleResult(status=status, **{**columns, **values})

"""The factor of a penalty by trials of one epoch: as large as cross-entropy and clean accuracy allow."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from robplug.data import Dataset
from robplug.defenses import Defense, Stack
from robplug.errors import InputError, StoreError
from robplug.isolation import cpu_threads, seeded_globals
from robplug.referee.store import explained, write_json
from robplug.rng import Rng
from robplug.step import Step, passing, untouched_buffers
from robplug.targets import evaluation_mode
from robplug.training import FINITE, fit
from robplug.training_plan import Options, read_options
from robplug.training_record import RECORD
from robplug.training_setup import (
    check_data,
    check_task,
    differences,
    identity,
    make_fabric,
    split_rows,
    sub_seed,
    versions,
)
from robplug.tuning_field import check_field, float_fields, is_proportional, with_value
from robplug.tuning_search import next_value

TRACE = "tune.json"
TRIALS = "tune"
TOLERANCE = 0.01
BATCHES = 10
HELD_OUT = 0.1


def choose(
    model: nn.Module,
    dataset: Dataset,
    defenses: Iterable[str | Defense],
    place: int = 0,
    field: str = "strength",
    *,
    out: str | Path,
    tolerance: float = TOLERANCE,
    progress: bool = False,
    origin: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Chooses the factor of a penalty by trials: the largest that does not hurt.

    1. R is the mean over ten random batches of the data of what the factor multiplies, as training would log it.
    2. The first trial has the factor ln(classes) / R.
    3. A trial trains the model as it was given for one epoch. Its factor is too high if the mean cross-entropy of the
       epoch reaches that of a random guess, ln(classes), or if the accuracy on clean held-out samples falls by more
       than the tolerance, or if the training diverges.
    4. If the first is not too high, ten times as much is tried, else a tenth of it, a hundredth, a thousandth. What is
       between the largest that is not too high and the smallest that is gets bisected on a logarithmic scale until they
       are within a factor of 1.25. The largest that is not too high is chosen; where none of those tried is too high,
       that is ten times the first, and the record says that there is no ``bracket``.

    Each trial is stored, and never made again once it is recorded; where one was interrupted it goes on.

    Source: Fidel et al., Adversarial Robustness via Stochastic Regularization of Neural Activation Sensitivity,
        section III-C.
    Differs: ln for the paper's log2, since cross-entropy is in nats. The paper judges a trial by cross-entropy alone
        where it says how, and names neither a tolerance nor a precision. A trial's rate is constant: it is the first
        epoch of a training, whose schedule would hardly have begun.

    Args:
        model: where all trials begin; it stays as it is.
        dataset: the training data; a share of it, ``held_out`` or else 10 %, is not trained on but measures accuracy.
        defenses: as for `robplug.training.fit`.
        place: of the penalty's defence among them; the only one of its class.
        field: its factor, a float field of its dataclass.
        out: folder of the training; gets ``tune.json`` and the trials, in ``tune``.
        tolerance: how much clean accuracy may fall, as a share.
        progress: print a line for each trial.
        origin: as for `robplug.training.fit`.
        **options: as in `robplug.training_plan.Options`.

    Returns:
        The ``trace`` of ``tune.json``: what was ``tuned``, and the ``tolerance``; ``batches``, the ten penalties, and
        ``R``; ``chance``, ln(classes); ``start``, the first factor; ``clean_accuracy`` before; ``trials`` with
        ``value``, ``cross_entropy``, ``clean_accuracy`` and ``too_high`` each; ``bracket`` and ``choice``.

    Raises:
        InputError: the field is no factor, there is no penalty, or all factors were too high.
        StoreError: ``out`` cannot be used, or its ``tune.json`` is of another tuning.
        KeyboardInterrupt: Ctrl-C; what is finished is stored.
    """
    settings, stack = read_options(options), Stack(defenses)
    check_data(dataset, settings, stack)
    check_task(model, dataset, settings, stack)
    if dataset.task != "classification":
        raise InputError("data for classification, of which a random guess has a known loss", dataset.task)
    check_field(stack.defenses, place, field)
    if not 0 <= tolerance < 1:
        raise InputError("a tolerance from 0 to below 1", tolerance, "0.01 lets one sample in a hundred go")
    own = {"epochs": 1, "schedule": "constant", "held_out": settings.held_out or HELD_OUT}
    trial = Options.model_validate({**settings.model_dump(), **own})
    tuning = _Tuning(model, dataset, stack.defenses, place, field, trial, Path(out), tolerance, dict(origin or {}))
    say = Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print if progress else _silent
    with cpu_threads(settings.threads):
        return tuning.run(say)


@dataclass(frozen=True)
class _Tuning:
    """A tuning: what `choose` is given, and the options of a trial."""

    model: nn.Module
    dataset: Dataset
    defenses: list[Defense]
    place: int
    field: str
    options: Options
    folder: Path
    tolerance: float
    origin: dict[str, Any]

    def run(self, say: Callable[[str], Any]) -> dict[str, Any]:
        """Makes the trials that are missing, and returns the record."""
        record = self._begin()
        self._write(record)
        say(
            f"{self._name}: R {record['R']:.4g}, first trial at {record['start']:.4g}, "
            f"clean accuracy before {_percent(record['clean_accuracy'])}"
        )
        for number, trial in enumerate(record["trials"], start=1):
            say(_line(number, trial))
        while (value := next_value(self._name, record["start"], record["trials"])) is not None:
            number = len(record["trials"]) + 1
            record["trials"].append(self._try(value, self.folder / TRIALS / str(number), record))
            self._write(record)
            say(_line(number, record["trials"][-1]))
        record["choice"] = max(trial["value"] for trial in record["trials"] if not trial["too_high"])
        record["bracket"] = any(trial["too_high"] for trial in record["trials"])
        self._write(record)
        note = "" if record["bracket"] else ", the largest that is tried: none was too high"
        say(f"{self._name} = {record['choice']:.4g}{note}")
        return record

    @property
    def _name(self) -> str:
        return f"{type(self.defenses[self.place]).__name__}.{self.field}"

    def _begin(self) -> dict[str, Any]:
        """Returns the record that an earlier run has left, or one without trials."""
        path = self.folder / TRACE
        with explained(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            text = path.read_text(encoding="utf-8") if path.exists() else ""
        return self._read(path, text) if text else self._measure()

    def _read(self, path: Path, text: str) -> dict[str, Any]:
        remedy = f"remove {path.name} and {TRIALS}/ to start over"
        try:
            stored = json.loads(text)
            record: dict[str, Any] = stored["trace"]
            other = differences(self._identity, stored["tuning"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(path, f"is damaged ({type(error).__name__}: {error}); {remedy}") from None
        if other:
            raise StoreError(path, f"was made with {other}; {remedy}")
        return record

    def _write(self, record: Mapping[str, Any]) -> None:
        write_json(self.folder / TRACE, {"tuning": self._identity, "trace": record, **versions()})

    @cached_property
    def _identity(self) -> dict[str, Any]:
        own = {"tuned": self._name, "tolerance": self.tolerance}
        return {**own, **identity(self.model, self.options, self._defenses(1.0), self.dataset, self.origin)}

    def _measure(self) -> dict[str, Any]:
        """Returns a record without trials: R, and what the model is before them."""
        held = split_rows(len(self.dataset), self.options)[1]
        logits = _logits(copy.deepcopy(self.model), self.dataset.x[held], self.options)
        batches = self._terms()
        if batches is None:
            others = ", ".join(name for name in float_fields(self.defenses[self.place]) if self._is_factor(name))
            raise InputError(f"a factor that a penalty is proportional to ({others or 'there is none'})", self._name)
        mean = sum(batches) / len(batches)
        if not 0 < mean < math.inf:
            remedy = "begin with another model, or choose by hand"
            raise InputError(f"a mean penalty per {self._name} that is finite and > 0", mean, remedy)
        chance = math.log(logits.shape[1])
        return {
            "tuned": self._name,
            "tolerance": self.tolerance,
            "batches": batches,
            "R": mean,
            "chance": chance,
            "start": chance / mean,
            "clean_accuracy": _accuracy(logits, self.dataset.y[held]),
            "trials": [],
            "bracket": None,
            "choice": None,
        }

    def _terms(self) -> list[float] | None:
        """Returns what the field multiplies, for some random batches; None if it is no factor."""
        one, two = self._penalties(1.0), self._penalties(2.0)
        if one == two:  # penalties may be logged without their factor
            return one
        rounding = 1e-4 if self.options.precision == "32-true" else 1e-2
        if not is_proportional(one, self._penalties(1.5), two, rounding):
            return None
        return [b - a for a, b in zip(one, two, strict=True)]  # without the terms that the factor is not of

    def _is_factor(self, field: str) -> bool:
        try:
            return replace(self, field=field)._terms() is not None
        except ValueError:  # it does not take the values
            return False

    def _penalties(self, value: float) -> list[float]:
        """Returns the penalty of a factor on some random batches, as training would log it."""
        options, stack, count = self.options, Stack(self._defenses(value)), len(self.dataset)
        name = type(self.defenses[self.place]).__name__
        fabric, model = make_fabric(options), copy.deepcopy(self.model)
        model.to(fabric.device)
        with seeded_globals(sub_seed(options.seed, "prepare")):
            stack.prepare(model)
        stack.train_mode()
        values = []
        for batch in range(BATCHES):
            seed = sub_seed(options.seed, "tune", batch)
            rows = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: options.batch_size]
            x, y = (tensor[rows].to(fabric.device) for tensor in (self.dataset.x, self.dataset.y))
            step = Step(model, x, y, Rng(seed, rows.tolist()), self.dataset.bounds)
            with seeded_globals(seed), passing("update"), fabric.autocast(), untouched_buffers(model):
                penalties = stack.losses(step).penalties
            if name not in penalties:
                raise InputError("a defence with a penalty", f"{name}, whose penalty is None", "tune another one")
            values.append(float(penalties[name]))
        return values

    def _try(self, value: float, folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
        """Makes a trial and judges it; what cannot be told of a training that diverged is None."""
        trained, options = copy.deepcopy(self.model), self.options.model_dump()
        try:
            trained = fit(
                trained, self.dataset, self._defenses(value), out=folder, resume=True, origin=self.origin, **options
            )
        except InputError as error:
            if error.expected != FINITE:
                raise
            return {"value": value, "cross_entropy": None, "clean_accuracy": None, "too_high": True}
        loss = json.loads((folder / RECORD).read_text(encoding="utf-8"))["history"][0]["loss"]
        held = split_rows(len(self.dataset), self.options)[1]
        accuracy = _accuracy(_logits(trained, self.dataset.x[held], self.options), self.dataset.y[held])
        fall = record["clean_accuracy"] - accuracy
        too_high = loss >= record["chance"] or fall > self.tolerance + 1e-9  # shares of samples are rounded
        return {"value": value, "cross_entropy": loss, "clean_accuracy": accuracy, "too_high": too_high}

    def _defenses(self, value: float) -> list[Defense]:
        return with_value(self.defenses, self.place, self.field, value)


def _logits(model: nn.Module, x: Tensor, options: Options) -> Tensor:
    """Returns (N, C) logits in eval mode; the model ends on the device of the training."""
    fabric = make_fabric(options)
    model.to(fabric.device)
    with evaluation_mode(model), fabric.autocast(), torch.no_grad():
        return torch.cat([model(part.to(fabric.device)).cpu() for part in x.split(options.batch_size)])


def _accuracy(logits: Tensor, y: Tensor) -> float:
    return float((logits.argmax(1) == y).double().mean())


def _line(number: int, trial: Mapping[str, Any]) -> str:
    seen = "diverged"
    if trial["cross_entropy"] is not None:
        seen = f"cross-entropy {trial['cross_entropy']:.4f}  clean accuracy {_percent(trial['clean_accuracy'])}"
    verdict = "too high" if trial["too_high"] else "can be raised"
    return f"trial {number:>2}  {trial['value']:<9.4g}  {seen}  {verdict}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _silent(text: str) -> None:
    """Says nothing."""

"""Defences, models and data sets that each break one rule of the conformance kit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from robplug import DatasetSpec, DefenseSpec, TargetSpec
from robplug.data import Dataset
from robplug.defenses import Defense, Prepared
from robplug.errors import InputError


@dataclass(frozen=True)
class Penalty(Defense):
    """The sum of squares of the weights.

    Attributes:
        strength: factor of the penalty.
    """

    strength: float = 0.1

    def penalty(self, step):
        return self.strength * sum(parameter.square().sum() for parameter in step.model.parameters())


class Infinite(Penalty):
    def penalty(self, step):
        return super().penalty(step) / 0


class Breaks(Penalty):
    def after_step(self, model):
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))


class Particular(Penalty):
    def prepare(self, model):
        return Prepared(layers=["layer4"])


def defense(**changes: object) -> DefenseSpec:
    """The Spec of the penalty, with changes."""
    settings = {"name": "wrong/penalty", "make": f"{__name__}:Penalty", "params": {"strength": 0.1}}
    return DefenseSpec(**{**settings, "pieces": ("penalty",), **changes})  # type: ignore[arg-type]


class Flat(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, 0]


def data(split: str = "test") -> Dataset:
    return Dataset("data", torch.rand(5, 1, 8, 8), torch.arange(5), (0.0, 1.0), ("a", "b", "c", "d", "e"))


def outside(split: str = "test") -> Dataset:
    return replace(data(), x=data().x * 255)


def double(split: str = "test") -> Dataset:
    return replace(data(), x=data().x.double())


def float_labels(split: str = "test") -> Dataset:
    return replace(data(), y=data().y.float())


def short(split: str = "test") -> Dataset:
    return replace(data(), y=data().y[:4])


def nameless(split: str = "test") -> Dataset:
    return replace(data(), class_names=("a", "b"))


def missing(split: str = "test") -> Dataset:
    raise InputError("the file data.npz", "nothing", "get it from its authors")


def model(name: str) -> TargetSpec:
    """The Spec of a listed model."""
    return TargetSpec(name=f"wrong/{name.lower()}", make=f"{__name__}:{name}")


def dataset(name: str) -> DatasetSpec:
    """The Spec of a data set."""
    return DatasetSpec(name=name.replace("_", "-"), make=f"{__name__}:{name}")


HONEST = (defense(), defense(name="wrong/penalty@strong", params={"strength": 1}), dataset("data"))
# the Spec, the check that does not apply to it, and why
SKIPPED = (
    (dataset("missing"), "samples", "the file data.npz"),
    (defense(make=f"{__name__}:Particular", pieces=("prepare", "penalty")), "trains", "'layer4'"),
)

# the Spec, the only checks that fail on it, and what their messages say
WRONG = (
    (defense(pieces=()), {"pieces"}, "it has the pieces ['penalty'], its Spec says []"),
    (defense(pieces=("penalty", "finish")), {"pieces"}, "its Spec says ['finish', 'penalty']"),
    (defense(pieces=("penalty", "polish")), {"pieces"}, "there are no pieces polish"),
    (defense(params={"strength": 1}), {"params"}, "the field's default is 0.1"),
    (defense(name="wrong/penalty@none", params={}), {"params"}, "the field strength is missing in the Spec's params"),
    (defense(make=f"{__name__}:Infinite"), {"trains"}, "the loss of step 0 is inf"),
    (
        defense(make=f"{__name__}:Breaks", pieces=("penalty", "after_step")),
        {"trains"},
        "the loss of step 1 is nan",
    ),
    (model("Flat"), {"answers"}, "logits of 2 images have shape (2,)"),
    (dataset("outside"), {"samples"}, "the bounds are (0.0, 1.0)"),
    (dataset("double"), {"samples"}, "x is torch.float64"),
    (dataset("float_labels"), {"samples"}, "labels are torch.float32"),
    (dataset("short"), {"samples"}, "got (4,) torch.int64"),
    (dataset("nameless"), {"samples"}, "below 2, got 0 to 4"),
)

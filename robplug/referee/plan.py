"""A plan: what is to be attacked, with what, under which threats. Read from TOML, checked before anything runs."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from robplug.errors import PlanError
from robplug.validation import problems

SHORTEST = "minimal"
"""An eps that asks for the smallest distance instead of giving a radius."""


def _radius(value: Any) -> float | None:
    """Reads an eps: a number, a fraction such as "8/255", or "minimal"."""
    if value == SHORTEST:
        return None
    if isinstance(value, bool):
        raise ValueError(f"expected a number, got {value}")
    try:
        number = float(Fraction(value)) if isinstance(value, str) else float(value)
    except (ValueError, ZeroDivisionError, TypeError, OverflowError) as error:
        raise ValueError(f'expected a number, a fraction like "8/255" or "{SHORTEST}", got {value!r}') from error
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"expected eps >= 0, got {value!r}")
    return number


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


def as_number(value: Any) -> Any:
    """Returns the number that a string such as "2/255" names; anything else as it is."""
    if isinstance(value, str):
        try:
            return int(value) if value.strip().isdecimal() else float(Fraction(value))
        except (ValueError, ZeroDivisionError, OverflowError):
            return value
    return value


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TargetEntry(_Entry):
    """A model under attack.

    Attributes:
        name: how it is called in tables; without ``make``, a name of ``robplug list targets``.
        make: ``file.py:object``, ``module:object`` or a listed name. A file's code is run.
        params: arguments of ``make``, if it is a function.
        weights: a .safetensors file, or one that torch loads with ``weights_only=True``.
        bounds: smallest and largest value of a sample; without, those of the data set.
        stochastic: whether two calls may differ.
        eot: draws averaged for an attack.
        draws: draws averaged for a verdict.
    """

    name: str
    make: str | None = None
    params: dict[str, Any] = Field(default_factory=dict)
    weights: str | None = None
    bounds: tuple[float, float] | None = None
    stochastic: bool = False
    eot: Annotated[int, Field(ge=1)] = 1
    draws: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _draws_of_a_stochastic_target(self) -> TargetEntry:
        if not self.stochastic and (self.eot > 1 or self.draws > 1):
            raise ValueError(f"eot = {self.eot} and draws = {self.draws} need stochastic = true")
        return self


class DatasetEntry(_Entry):
    """A data set.

    Attributes:
        name: a name of ``robplug list datasets``.
        split: which part of it.
        root: folder of its files, where it is not shipped.
        samples: how many, from the start; all without.
        params: further parameters of the data set.
    """

    name: str
    split: str = "test"
    root: str | None = None
    samples: Annotated[int, Field(ge=1)] | None = None
    params: dict[str, Any] = Field(default_factory=dict)


class ThreatEntry(_Entry):
    """What the attacker may do.

    Attributes:
        norm: a name of ``robplug list norms``.
        eps: one radius or several; fractions as strings, ``"minimal"`` for the smallest distance.
        targeted: whether a given class is to be reached.
        goal: how that class is chosen: a random wrong one, the one after y, or the least likely.
    """

    norm: str
    eps: Annotated[list[Annotated[float | None, BeforeValidator(_radius)]], BeforeValidator(_as_list)]
    targeted: bool = False
    goal: Literal["random", "next", "least-likely"] = "random"


class AttackEntry(BaseModel):
    """An attack; keys that are not listed here are its parameters.

    Attributes:
        name: a name of ``robplug list attacks``, or a canonical one such as ``pgd``.
        libraries: for a canonical attack, the libraries that are to run it; all that have it without.
        mode: ``harmonised`` (canonical parameters), ``as-shipped`` (the library's defaults); by default a canonical
            attack is harmonised and any other is run as ``own``, with the parameters given.
        norms: the threats that it meets; all of the plan without.
        timeout_s: time limit of a chunk.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    libraries: list[str] | None = None
    mode: Literal["harmonised", "as-shipped"] | None = None
    norms: list[str] | None = None
    timeout_s: Annotated[float, Field(gt=0)] | None = None

    @property
    def params(self) -> dict[str, Any]:
        """The parameters given, fractions read as numbers."""
        return {key: as_number(value) for key, value in (self.model_extra or {}).items()}


class Plan(_Entry):
    """A plan; see the attributes of its entries.

    Attributes:
        seed: one seed or several; each makes cells of its own.
        out: run directory.
        targets: models.
        datasets: data.
        threats: norms and radii.
        attacks: attacks.
        chunk: samples per unit of work; a finished chunk is never run again.
        batch_size: samples per forward pass of the referee.
        keep: ``examples`` keeps some adversarial images of each cell, ``all`` all of them, ``none`` none.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:1``.
        threads: of torch on the CPU; its own choice without. One is fastest for small networks.
        timeout_s: time limit of a chunk for attacks that name none.
    """

    seed: Annotated[list[Annotated[int, Field(ge=0)]], BeforeValidator(_as_list)] = [0]
    out: str = "runs/run"
    targets: Annotated[list[TargetEntry], Field(min_length=1)]
    datasets: Annotated[list[DatasetEntry], Field(min_length=1)]
    threats: Annotated[list[ThreatEntry], Field(min_length=1)]
    attacks: Annotated[list[AttackEntry], Field(min_length=1)]
    chunk: Annotated[int, Field(ge=1)] = 64
    batch_size: Annotated[int, Field(ge=1)] = 256
    keep: Literal["examples", "all", "none"] = "examples"
    device: str = "auto"
    threads: Annotated[int, Field(ge=1)] | None = None
    timeout_s: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _distinct_targets(self) -> Plan:
        names = [entry.name for entry in self.targets]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"expected targets of different names, got {name!r} twice; rename one, with make=")
        return self


def load_plan(source: Mapping[str, Any] | str | Path) -> tuple[Plan, str]:
    """Reads and checks a plan.

    Args:
        source: path of a TOML file, or its content.

    Returns:
        The plan, and the name under which errors speak of it.

    Raises:
        PlanError: the file is missing or no TOML, a key is unknown or missing, or a value does not fit.
    """
    where = "plan" if isinstance(source, Mapping) else str(source)
    content = source if isinstance(source, Mapping) else read_toml(Path(source))
    try:
        return Plan.model_validate(content), where
    except ValidationError as error:
        tables: dict[str, type[BaseModel]] = {
            "": Plan,
            "targets": TargetEntry,
            "datasets": DatasetEntry,
            "threats": ThreatEntry,
        }
        other = "; this looks like a training plan: robplug train runs it" if "model" in content else ""
        raise PlanError(where, problems(error, tables) + other) from None


def read_toml(path: Path) -> dict[str, Any]:
    """Reads a TOML file.

    Raises:
        PlanError: there is no such file, or it is no TOML; the message has the line.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(str(path), f"cannot be read: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PlanError(str(path), f"is not valid TOML: {error}") from None

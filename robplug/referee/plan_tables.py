"""The tables of a plan: targets, data sets, threats, attacks and transfers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from robplug.types import Task

LEAVE_ONE_OUT = "leave-one-out"
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


def as_list(value: Any) -> Any:
    """Returns a list as it is, and anything else as a list of one."""
    return value if isinstance(value, list | tuple) else [value]


def as_number(value: Any) -> Any:
    """Returns the number that a string such as "2/255" names, in a list too; anything else as it is."""
    if isinstance(value, list):
        return [as_number(item) for item in value]
    if isinstance(value, str):
        try:
            return int(value) if value.strip().isdecimal() else float(Fraction(value))
        except (ValueError, ZeroDivisionError, OverflowError):
            return value
    return value


class Entry(BaseModel):
    """A table of a plan: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TargetEntry(Entry):
    """A model under attack.

    Attributes:
        name: how it is called in tables; without ``make``, a name of ``robplug list targets``.
        make: ``file.py:object``, ``module:object`` or a listed name. A file's code is run.
        of: names of targets further up that it is made of, such as the members of a ``robplug/ensemble``; ``make`` gets
            them as its first arguments.
        params: arguments of ``make``, if it is a function.
        weights: a .safetensors file, or one that torch loads with ``weights_only=True``.
        bounds: smallest and largest value of a sample; without, those of the data set.
        task: what it does; without, what ``robplug list targets`` says of it, or what the data set is labelled for.
        stochastic: whether two calls may differ.
        eot: draws averaged for an attack.
        draws: draws averaged for a verdict.
        adaptive: attacks of the plan that were made against its defence, by name or label.
    """

    name: str
    make: str | None = None
    of: Annotated[list[str], Field(min_length=1)] | None = None
    params: dict[str, Any] = Field(default_factory=dict)
    weights: str | None = None
    bounds: tuple[float, float] | None = None
    task: Task | None = None
    stochastic: bool = False
    eot: Annotated[int, Field(ge=1)] = 1
    draws: Annotated[int, Field(ge=1)] = 1
    adaptive: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _draws_of_a_stochastic_target(self) -> TargetEntry:
        if not self.stochastic and (self.eot > 1 or self.draws > 1):
            raise ValueError(f"eot = {self.eot} and draws = {self.draws} need stochastic = true")
        return self


class DatasetEntry(Entry):
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


class ThreatEntry(Entry):
    """What the attacker may do.

    Attributes:
        norm: a name of ``robplug list norms``.
        eps: one radius or several; fractions as strings, ``"minimal"`` for the smallest distance.
        targeted: whether a given class is to be reached.
        goal: how that class is chosen: a random wrong one, the one after y, or the least likely.
    """

    norm: str
    eps: Annotated[list[Annotated[float | None, BeforeValidator(_radius)]], BeforeValidator(as_list)]
    targeted: bool = False
    goal: Literal["random", "next", "least-likely"] = "random"


@dataclass(frozen=True)
class Mixture:
    """A source made of others' perturbations.

    Attributes:
        parts: names of the sources whose perturbations are added up.
        permuted: whether rows and columns of the sum come in random order.
    """

    parts: tuple[str, ...]
    permuted: bool = False

    @property
    def name(self) -> str:
        """How tables call it."""
        return " + ".join(self.parts) + (", permuted" if self.permuted else "")


class TransferEntry(Entry):
    """Attacks that are made on some targets and judged on others; a plan that has any attacks the sources alone.

    Attributes:
        sources: names of targets, or ``"leave-one-out"``: for each victim the ensemble (by logits) of all the others.
        victims: names of targets that judge what was found on the sources.
        count: which samples count: those that all models of the table classify correctly (``common``), or for each pair
            those that its two do (``pairs``).
        sums: groups of sources whose perturbations are added up and judged as a source of their own.
        permuted: whether each source and sum is judged again with the rows and columns of its perturbations in random
            order: a control that should do nothing.
    """

    sources: list[str] | Literal["leave-one-out"]
    victims: Annotated[list[str], Field(min_length=1)]
    count: Literal["common", "pairs"] = "common"
    sums: list[Annotated[list[str], Field(min_length=2)]] = Field(default_factory=list)
    permuted: bool = False

    @model_validator(mode="after")
    def _enough(self) -> TransferEntry:
        for group in self.sums:
            for name in group:
                if name not in self.source_names() or group.count(name) > 1:
                    raise ValueError(f"expected a sum of different sources {self.source_names()}, got {group}")
        if self.sources == LEAVE_ONE_OUT and len(self.victims) < 3:
            raise ValueError(f"leave-one-out needs at least 3 victims, got {self.victims}")
        if not self.sources:
            raise ValueError("expected at least one source, got none")
        return self

    def ensembles(self) -> list[TargetEntry]:
        """Returns the targets that leave one out."""
        if self.sources != LEAVE_ONE_OUT:
            return []
        return [
            TargetEntry(
                name=f"all but {out}", make="robplug/ensemble", of=[name for name in self.victims if name != out]
            )
            for out in self.victims
        ]

    def mixtures(self) -> list[Mixture]:
        """Returns what is made of the sources' perturbations beside judging them as they are."""
        alone = [(name,) for name in self.source_names()]
        sums = [tuple(group) for group in self.sums]
        plain = [Mixture(group) for group in sums]
        return [*plain, *(Mixture(group, permuted=True) for group in (*alone, *sums) if self.permuted)]

    def source_names(self) -> list[str]:
        """Returns the names of the sources."""
        return [entry.name for entry in self.ensembles()] or list(self.sources)


class AttackEntry(BaseModel):
    """An attack; keys that are not listed here are its parameters.

    Attributes:
        name: a name of ``robplug list attacks``, or a canonical one such as ``pgd``.
        libraries: for a canonical attack, the libraries that are to run it; all that have it without.
        mode: ``harmonised`` (canonical parameters), ``as-shipped`` (the library's defaults); by default a canonical
            attack is harmonised and any other is run as ``own``, with the parameters given.
        targets: the targets that it is run on; all of the plan without.
        norms: the threats that it meets; all of the plan without.
        sweep: one parameter with a list of values, each of which makes an attack; the report draws a curve over them.
        timeout_s: time limit of a chunk.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    libraries: list[str] | None = None
    mode: Literal["harmonised", "as-shipped"] | None = None
    targets: list[str] | None = None
    norms: list[str] | None = None
    sweep: dict[str, Annotated[list[Any], Field(min_length=2)]] | None = None
    timeout_s: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _one_sweep(self) -> AttackEntry:
        swept = list(self.sweep or ())
        if self.sweep is not None and len(swept) != 1:
            raise ValueError(f"expected a sweep over one parameter, got {swept}; write an attack for each further one")
        if swept and swept[0] in (self.model_extra or {}):
            raise ValueError(f"{swept[0]} is given and swept; leave out one of the two")
        return self

    @property
    def swept(self) -> str:
        """The parameter that is swept, or an empty string."""
        return next(iter(self.sweep or ()), "")

    def each(self) -> list[AttackEntry]:
        """Returns an attack for each value of the sweep, or itself."""
        own = self.model_dump(exclude={"sweep"}, exclude_unset=True)
        return [AttackEntry(**own, **{self.swept: value}) for value in (self.sweep or {}).get(self.swept, ())] or [self]

    @property
    def params(self) -> dict[str, Any]:
        """The parameters given, fractions read as numbers."""
        return {key: as_number(value) for key, value in (self.model_extra or {}).items()}

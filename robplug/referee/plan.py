"""A plan: what is to be attacked, with what, under which threats. Read from TOML, checked before anything runs."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from robplug.errors import PlanError
from robplug.referee.plan_tables import (
    AttackEntry,
    DatasetEntry,
    Entry,
    Mixture,
    TargetEntry,
    ThreatEntry,
    TransferEntry,
    as_list,
)
from robplug.validation import problems


class Plan(Entry):
    """A plan; see the attributes of its entries.

    Attributes:
        seed: one seed or several; each makes cells of its own.
        out: run directory.
        targets: models.
        datasets: data.
        threats: norms and radii.
        attacks: attacks.
        transfer: who is attacked and who judges, if that is not the same.
        chunk: samples per unit of work; a finished chunk is never run again.
        batch_size: samples per forward pass of the referee.
        probes: samples on which each model is probed at the end, for the diagnostics; 0 probes none.
        keep: ``examples`` keeps some adversarial images of each cell, ``all`` all of them, ``none`` none.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:1``.
        threads: of torch on the CPU; its own choice without. One is fastest for small networks.
        timeout_s: time limit of a chunk for attacks that name none.
    """

    seed: Annotated[list[Annotated[int, Field(ge=0)]], BeforeValidator(as_list)] = Field([0])
    out: str = "runs/run"
    targets: Annotated[list[TargetEntry], Field(min_length=1)]
    datasets: Annotated[list[DatasetEntry], Field(min_length=1)]
    threats: Annotated[list[ThreatEntry], Field(min_length=1)]
    attacks: Annotated[list[AttackEntry], Field(min_length=1)]
    transfer: Annotated[list[TransferEntry], Field(min_length=1)] | None = None
    chunk: Annotated[int, Field(ge=1)] = 64
    batch_size: Annotated[int, Field(ge=1)] = 256
    probes: Annotated[int, Field(ge=0)] = 64
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

    @model_validator(mode="after")
    def _known_targets(self) -> Plan:
        above: list[str] = []
        for entry in self.targets:
            for name in entry.of or ():
                if name not in above:
                    raise ValueError(f"targets.{entry.name}.of: {name!r} is no target further up; there are {above}")
            above.append(entry.name)
        for place, transfer in enumerate(self.transfer or ()):
            for key in ("sources", "victims"):
                names = getattr(transfer, key)
                for name in names if isinstance(names, list) else ():
                    if name not in above:
                        raise ValueError(f"transfer[{place}].{key}: {name!r} is no target of the plan; it has {above}")
                    if names.count(name) > 1:
                        raise ValueError(f"transfer[{place}].{key}: {name!r} is there twice")
        known = [entry.name for entry in self.all_targets()]
        for place, attack in enumerate(self.attacks):
            for name in attack.targets or ():
                if name not in known:
                    raise ValueError(f"attacks[{place}].targets: {name!r} is no target of the plan; it has {known}")
        if self.transfer is not None:
            self._check_part(above)
        return self

    def _check_part(self, names: list[str]) -> None:
        """Refuses a transfer in which a target has no part, and ensembles that differ and would have one name."""
        ensembles = [entry for transfer in self.transfer or () for entry in transfer.ensembles()]
        part = {name for entry in (*self.targets, *ensembles) for name in entry.of or ()}
        part |= {name for transfer in self.transfer or () for name in (*transfer.source_names(), *transfer.victims)}
        for name in names:
            if name not in part:
                raise ValueError(
                    f"the target {name!r} is no source, victim or member; name it in transfer, or remove it"
                )
        for one in ensembles:
            if any(one.name == other.name and one.of != other.of for other in (*ensembles, *self.targets)):
                raise ValueError(
                    f"expected one target of the name {one.name!r}; rename it, or write one transfer of two"
                )

    def all_targets(self) -> list[TargetEntry]:
        """Returns the targets, and the ensembles that leave one out."""
        left_out = [entry for transfer in self.transfer or () for entry in transfer.ensembles()]
        return [*self.targets, *{entry.name: entry for entry in left_out}.values()]

    def members(self) -> dict[str, list[str]]:
        """Returns what targets are made of, by name: all that `of` leads to."""
        found: dict[str, list[str]] = {}
        for entry in self.all_targets():  # members stand further up
            direct = entry.of or ()
            found[entry.name] = list(dict.fromkeys([*direct, *(name for one in direct for name in found[one])]))
        return {name: members for name, members in found.items() if members}

    def attacked(self) -> list[TargetEntry]:
        """Returns the targets that are attacked: the sources where there is a transfer, else all."""
        if self.transfer is None:
            return list(self.targets)
        sources = [name for transfer in self.transfer for name in transfer.source_names()]
        return [entry for entry in self.all_targets() if entry.name in sources]

    def mixtures(self) -> list[tuple[Mixture, str]]:
        """Returns (mixture, victim) of all transfers, each once."""
        found = [(one, v) for transfer in self.transfer or () for one in transfer.mixtures() for v in transfer.victims]
        return list(dict.fromkeys(found))

    def pairs(self) -> list[tuple[str, str]]:
        """Returns (source, victim) names of all transfers, each once and no source with itself."""
        found = [(s, v) for transfer in self.transfer or () for s in transfer.source_names() for v in transfer.victims]
        return [pair for pair in dict.fromkeys(found) if pair[0] != pair[1]]


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
    if "model" in content and "targets" not in content:
        raise PlanError(where, "this looks like a training plan: robplug train runs it")
    try:
        return Plan.model_validate(content), where
    except ValidationError as error:
        tables: dict[str, type[BaseModel]] = {
            "": Plan,
            "targets": TargetEntry,
            "datasets": DatasetEntry,
            "threats": ThreatEntry,
            "transfer": TransferEntry,
        }
        raise PlanError(where, problems(error, tables)) from None


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

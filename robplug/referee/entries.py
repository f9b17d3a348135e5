"""Who is in a run: the subjects that are attacked, and the attacks, told apart and numbered."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from robplug.referee.rundir import StoredCell, printable


@dataclass(frozen=True)
class Subject:
    """What is attacked and how: all attacks on one subject together make a worst case.

    Attributes:
        number: from 0, in the order of the plan.
        target: name of the model, followed by a piece of its digest if another model of the run has that name.
        dataset: name of the data.
        norm: of the threat.
        bounds: smallest and largest value of the data.
        targeted: whether a given class is to be reached.
        goal_rule: how that class is chosen, else "".
    """

    number: int
    target: str
    dataset: str
    norm: str
    bounds: tuple[float, float]
    targeted: bool
    goal_rule: str


@dataclass(frozen=True)
class Attack:
    """An attack of the plan; the same one on every target and at every radius.

    Attributes:
        number: from 1, in the order of the plan; tables and figures refer to it.
        name: its label, with what tells it from other attacks of that label.
        library: origin of the implementation.
        mode: harmonised, as-shipped or own.
        needs: gradients, scores or labels.
        budget: fixed or minimal.
        seed: of the plan.
        swept: the parameter over which the plan sweeps, or "".
        at: its value, None if there is none or it is no number.
        family: number of the first attack of its sweep; its own without.
    """

    number: int
    name: str
    library: str
    mode: str
    needs: str
    budget: str
    seed: int
    swept: str = ""
    at: float | None = None
    family: int = 0


def list_subjects(cells: Sequence[StoredCell]) -> tuple[tuple[Subject, ...], list[int]]:
    """Returns the subjects of a run, and for each cell the number of its subject."""
    places: dict[str, int] = {}
    subject_of = [places.setdefault(subject_identity(cell), len(places)) for cell in cells]
    models: dict[str, list[str]] = {}
    for cell in cells:
        known = models.setdefault(cell.record["target"], [])
        if (digest := _model_digest(cell)) not in known:
            known.append(digest)
    first = [cells[subject_of.index(number)] for number in range(len(places))]
    return tuple(_subject(number, cell, models) for number, cell in enumerate(first)), subject_of


def _subject(number: int, cell: StoredCell, models: dict[str, list[str]]) -> Subject:
    name, threat = cell.record["target"], cell.record["threat"]
    if len(models[name]) > 1:
        name = f"{name} ({_model_digest(cell)[:8]})"
    low, high = threat["bounds"]
    bounds = (float(low), float(high))
    return Subject(
        number=number,
        target=printable(name),
        dataset=printable(cell.record["dataset"]),
        norm=printable(threat["norm"]),
        bounds=bounds,
        targeted=cell.targeted,
        goal_rule=printable(cell.record["goal_rule"] or ""),
    )


def subject_identity(cell: StoredCell) -> str:
    """Names do not make a subject: with other weights or data the same name is something else."""
    record, threat = cell.record, cell.record["threat"]
    parts = [record["target"], record["dataset"], threat["norm"], threat["bounds"], threat["targeted"]]
    return json.dumps([*parts, record["goal_rule"], _model_digest(cell), record["digests"]["data"]])


def _model_digest(cell: StoredCell) -> str:
    digests = cell.record["digests"]
    return f"{digests['weights']}{digests['model_source']}"


def list_attacks(cells: Sequence[StoredCell]) -> tuple[tuple[Attack, ...], list[int]]:
    """Returns the attacks of a run, and for each cell the number of its attack."""
    places: dict[str, int] = {}
    number_of = [places.setdefault(_attack_identity(cell.record), len(places) + 1) for cell in cells]
    first = [cells[number_of.index(number)].record for number in range(1, len(places) + 1)]
    families: dict[str, int] = {}
    attacks = [
        _attack(record, number, families.setdefault(_attack_identity(record, without=record.get("swept", "")), number))
        for number, record in enumerate(first, start=1)
    ]
    return tuple(_told_apart(attacks, [record["params_passed"] for record in first])), number_of


def _attack(record: dict[str, Any], number: int, family: int) -> Attack:
    swept = record.get("swept", "")
    value = record["params_passed"].get(swept)
    return Attack(
        number,
        printable(record["label"]),
        printable(record["library"]),
        record["mode"],
        record["needs"],
        record["budget"],
        record["seed"],
        printable(swept),
        float(value) if isinstance(value, int | float) else None,
        family,
    )


def _attack_identity(record: dict[str, Any], without: str = "") -> str:
    params = {name: value for name, value in record["params_passed"].items() if name != without}
    return json.dumps([record["label"], record["mode"], params, record["seed"], without], sort_keys=True)


def _told_apart(attacks: list[Attack], params: list[dict[str, Any]]) -> list[Attack]:
    """Adds to the names what makes them different: the mode, then parameters, then the seed."""
    additions = (
        [" as shipped" if attack.mode == "as-shipped" else "" for attack in attacks],
        _what_differs(attacks, params),
        [f" seed {attack.seed}" for attack in attacks],
    )
    for addition in additions:
        shared = Counter(attack.name for attack in attacks)
        attacks = [
            replace(attack, name=attack.name + addition[i])
            if shared[attack.name] > 1 or addition is additions[0]
            else attack
            for i, attack in enumerate(attacks)
        ]
    return attacks


def _what_differs(attacks: list[Attack], params: list[dict[str, Any]]) -> list[str]:
    """Returns for each attack the parameters in which those of its label differ, as " name=value"."""
    found = []
    for attack, own in zip(attacks, params, strict=True):
        peers = [other for peer, other in zip(attacks, params, strict=True) if peer.name == attack.name]
        names = [name for name, value in own.items() if any(other.get(name, peers) != value for other in peers)]
        found.append("".join(f" {name}={own[name]}" for name in names))
    return found

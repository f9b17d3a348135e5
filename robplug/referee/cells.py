"""Cells: a plan's targets x datasets x attacks x threats x seeds, and those that judge others' samples."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from robplug.errors import InputError, PlanError, UnknownNameError
from robplug.referee.plan import Plan
from robplug.referee.plan_tables import AttackEntry, DatasetEntry, Mixture, TargetEntry, ThreatEntry
from robplug.registry import Registry, canonical_settings, check_params
from robplug.types import AttackSpec, ThreatModel


@dataclass(frozen=True)
class Cell:
    """One attack on one target with one data set under one threat with one seed.

    Attributes:
        index: place in the plan.
        target: the plan's entry.
        dataset: the plan's entry.
        spec: the attack.
        label: how people call it.
        mode: harmonised, as-shipped or own.
        params_passed: parameters as the plan has them.
        params: parameters in force.
        threat: norm, eps (None for an attack that looks for the smallest distance) and whether targeted.
        readings: the plan's radii that are read from this cell.
        goal: rule for the class to be reached.
        seed: of the plan.
        timeout_s: time limit of a chunk.
        swept: the parameter over which the plan sweeps, or "".
        source: the cell whose adversarial samples are judged here on another target; None where they are made.
        added: further cells whose perturbations are added to those of the source.
        permuted: whether the rows and columns of the perturbation come in random order.
    """

    index: int
    target: TargetEntry
    dataset: DatasetEntry
    spec: AttackSpec
    label: str
    mode: str
    params_passed: dict[str, Any]
    params: dict[str, Any]
    threat: ThreatModel
    readings: tuple[float, ...]
    goal: str
    seed: int
    timeout_s: float | None
    swept: str = ""
    source: Cell | None = None
    added: tuple[Cell, ...] = ()
    permuted: bool = False

    @property
    def sources(self) -> tuple[Cell, ...]:
        """The cells whose adversarial samples are judged here."""
        return () if self.source is None else (self.source, *self.added)

    @property
    def source_name(self) -> str | None:
        """How tables call what was attacked, None where it is the target."""
        parts = tuple(cell.target.name for cell in self.sources)
        return Mixture(parts, self.permuted).name if parts else None


def expand(
    plan: Plan, registry: Registry, where: str = "plan", bounds: Sequence[tuple[float, float]] = ()
) -> list[Cell]:
    """Returns the cells of a plan in its order; a cell that is judged elsewhere comes before those that judge it.

    Args:
        plan: what is to be run.
        registry: the installed plugins.
        where: how errors speak of the plan.
        bounds: of each data set, which harmonised parameters may depend on; [0, 1] as long as none is loaded.

    Raises:
        PlanError: a name is unknown, a parameter is not the attack's or cannot be honoured, or an attack does not serve
            a threat; the message names the key.
    """
    cells: list[Cell] = []
    _check_names(plan, registry, where)
    entries = {entry.name: entry for entry in plan.all_targets()}
    for target in plan.attacked():
        attacks = [entry for entry in plan.attacks if entry.targets is None or target.name in entry.targets]
        victims = [entries[victim] for source, victim in plan.pairs() if source == target.name]
        for place, dataset in enumerate(plan.datasets):
            box = bounds[place] if bounds else (0.0, 1.0)
            for entry in attacks:
                key = f"{where}: attacks[{plan.attacks.index(entry)}]"
                for found in _of_attack(plan, entry, box, registry, key):
                    for seed in plan.seed:
                        made = Cell(index=len(cells), target=target, dataset=dataset, seed=seed, **found)
                        cells.append(made)
                        cells += [
                            replace(made, index=made.index + 1 + place, target=victim, source=made)
                            for place, victim in enumerate(victims)
                        ]
    _check_adaptive(plan, cells, where)
    return [*cells, *_mixed(plan, cells, entries, where)]


def _mixed(plan: Plan, cells: Sequence[Cell], entries: Mapping[str, TargetEntry], where: str) -> Iterator[Cell]:
    """Yields the cells of sums and permutations, which come after all that they are made of."""
    count = len(cells)
    made = [cell for cell in cells if cell.source is None]
    for mixture, victim in plan.mixtures():
        for first in made:
            if first.target.name != mixture.parts[0]:
                continue
            group = [_counterpart(first, made, name, where) for name in mixture.parts]
            if len(group) > 1 and first.threat.eps is not None:
                remedy = "use an attack that looks for the smallest distance, such as dag/segmentation"
                raise PlanError(
                    f"{where}: transfer.sums", f"a sum of {first.label} leaves the ball of its threat; {remedy}"
                )
            yield replace(
                first,
                index=count,
                target=entries[victim],
                source=first,
                added=tuple(group[1:]),
                permuted=mixture.permuted,
            )
            count += 1


def _counterpart(cell: Cell, cells: Sequence[Cell], target: str, where: str) -> Cell:
    """Returns the cell of another target that stands beside this one: the same attack, or the only one it has."""
    threat = (cell.dataset, cell.threat, cell.seed)
    own = [one for one in cells if one.target.name == target and (one.dataset, one.threat, one.seed) == threat]
    same = [one for one in own if (one.label, one.params) == (cell.label, cell.params)]
    if len(same or own) != 1:
        problem = f"{target!r} has {len(own)} attacks to add to {cell.label} on {cell.target.name!r}"
        raise PlanError(f"{where}: transfer.sums", f"{problem}; expected the same one, or one alone")
    return (same or own)[0]


def _check_adaptive(plan: Plan, cells: Sequence[Cell], where: str) -> None:
    known = {name: None for cell in cells for name in names_of(cell.spec.name, cell.label)}
    for entry in plan.targets:
        for name in entry.adaptive:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3)
                hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known)}"
                raise PlanError(f"{where}: targets.{entry.name}.adaptive", f"{name!r} is no attack of the plan; {hint}")


def names_of(attack: str, label: str) -> tuple[str, str, str]:
    """Returns the names by which a plan may call an attack: the Spec's, its label, and its canonical one."""
    return attack, label, label.partition(" \u00b7 ")[0]


def _check_names(plan: Plan, registry: Registry, where: str) -> None:
    checks = [(f"datasets[{i}]", "dataset", entry.name) for i, entry in enumerate(plan.datasets)]
    checks += [(f"threats[{i}]", "norm", entry.norm) for i, entry in enumerate(plan.threats)]
    made = [(i, entry.make or entry.name) for i, entry in enumerate(plan.targets)]
    checks += [(f"targets[{i}]", "target", make) for i, make in made if ":" not in make]
    for key, kind, name in checks:
        try:
            registry.spec(kind, name)
        except UnknownNameError as error:
            remedy = "; give make= for a model of your own" if kind == "target" else ""
            raise PlanError(f"{where}: {key}", f"{error}{remedy}") from None


def _of_attack(
    plan: Plan, entry: AttackEntry, bounds: tuple[float, float], registry: Registry, where: str
) -> Iterator[dict[str, Any]]:
    """Yields what the cells of one attack entry have in common, a dict per library and threat."""
    have = sorted({threat.norm for threat in plan.threats})
    for norm in entry.norms or ():
        if norm not in have:
            raise PlanError(f"{where}.norms", f"{norm!r} is no threat of the plan, which has {', '.join(have)}")
    threats = [threat for threat in plan.threats if entry.norms is None or threat.norm in entry.norms]
    for each in entry.each():
        for threat in threats:
            for library in _libraries(each, threat, registry, where):
                for eps in _radii(each, threat, library, registry, where):
                    model = ThreatModel(threat.norm, eps, bounds, threat.targeted)
                    yield {**_one(plan, each, threat, model, library, registry, where), "swept": entry.swept}


def _is_canonical(entry: AttackEntry) -> bool:
    return "/" not in entry.name


def _libraries(entry: AttackEntry, threat: ThreatEntry, registry: Registry, where: str) -> list[str | None]:
    if not _is_canonical(entry):
        if entry.libraries is not None:
            raise PlanError(f"{where}.libraries", f"goes with a canonical name such as pgd, not with {entry.name!r}")
        return [None]
    try:
        canonical_settings(entry.name, {})
    except UnknownNameError as error:
        raise PlanError(f"{where}.name", str(error)) from None
    libraries = entry.libraries or registry.canonical_libraries(entry.name, threat.norm)
    if not libraries:
        raise PlanError(f"{where}.name", f"no installed library has {entry.name!r} for {threat.norm}")
    return list(libraries)


def _radii(
    entry: AttackEntry, threat: ThreatEntry, library: str | None, registry: Registry, where: str
) -> list[float | None]:
    """Returns the radii for which cells are made: each of the threat's, or None alone for a minimal attack."""
    spec = _spec(entry, threat, library, registry, where)
    if spec.budget == "minimal":
        return [None]
    radii = [eps for eps in threat.eps if eps is not None]
    if len(radii) < len(threat.eps):
        raise PlanError(f"{where}.name", f"{spec.name} needs a radius, and the threat {threat.norm} asks for 'minimal'")
    return list(radii)


def _spec(entry: AttackEntry, threat: ThreatEntry, library: str | None, registry: Registry, where: str) -> AttackSpec:
    try:
        if library is not None:
            spec: AttackSpec = registry.harmonised(entry.name, library, {}, ThreatModel(threat.norm, 1.0))[0]
        else:
            spec = registry.spec("attack", entry.name)
    except (UnknownNameError, PlanError) as error:
        raise PlanError(f"{where}.name", str(error)) from None
    if threat.norm not in spec.norms:
        remedy = "restrict it with norms= or remove the threat"
        raise PlanError(f"{where}.name", f"{spec.name} serves {', '.join(spec.norms)}, not {threat.norm}; {remedy}")
    if not (spec.targeted if threat.targeted else spec.untargeted):
        raise PlanError(f"{where}.name", f"{spec.name} cannot serve a threat with targeted={threat.targeted}")
    return spec


def _one(
    plan: Plan,
    entry: AttackEntry,
    threat: ThreatEntry,
    model: ThreatModel,
    library: str | None,
    registry: Registry,
    where: str,
) -> dict[str, Any]:
    spec = _spec(entry, threat, library, registry, where)
    mode = entry.mode or ("harmonised" if library else "own")
    try:
        params = _params_in_force(entry, spec, library, mode, model, registry)
    except (InputError, PlanError, UnknownNameError) as error:
        raise PlanError(where, str(error)) from None
    for name, value in params.items():
        if not _is_plain(value):
            problem = f"expected a number, a string, or a list or table of these, got {value!r}"
            raise PlanError(f"{where}.{name}", f"{problem}; a plan holds nothing else, call the attack in Python")
    readings = (model.eps,) if model.eps is not None else tuple(radius for radius in threat.eps if radius is not None)
    return {
        "spec": spec,
        "label": f"{entry.name} · {library}" if library else entry.name,
        "mode": mode,
        "params_passed": entry.params,
        "params": params,
        "threat": model,
        "readings": readings,
        "goal": threat.goal if threat.targeted else "",
        "timeout_s": entry.timeout_s or plan.timeout_s,
    }


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):  # an object, or a number that is none
        return False
    return True


def _params_in_force(
    entry: AttackEntry, spec: AttackSpec, library: str | None, mode: str, threat: ThreatModel, registry: Registry
) -> dict[str, Any]:
    if mode == "as-shipped":
        if entry.params:
            raise InputError("no parameters with mode = 'as-shipped'", entry.params, "leave out one of the two")
        return dict(spec.params)
    if library is None:
        if mode == "harmonised":
            raise InputError("a canonical name with mode = 'harmonised'", repr(entry.name))
        check_params(spec, entry.params)
        return {**spec.params, **entry.params}
    _, params = registry.harmonised(entry.name, library, entry.params, threat)
    check_params(spec, params)
    return {**spec.params, **params}

"""Jobs: cells with their models and data loaded, so that every error comes before the first attack."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from robplug.data import Dataset
from robplug.errors import InputError, PlanError
from robplug.isolation import seeded_globals
from robplug.norms import Norm
from robplug.referee.cells import Cell, expand
from robplug.referee.digests import identify, plugin_digest, source_digest, state_digest
from robplug.referee.keys import Identity, cell_key
from robplug.referee.load import Model, count_classes, make_dataset, make_target
from robplug.referee.plan import Plan
from robplug.referee.plan_tables import TargetEntry
from robplug.referee.precision import check_computable
from robplug.registry import Registry
from robplug.rng import Rng
from robplug.targets import OFFERS, Target, evaluation_mode
from robplug.types import Attack


@dataclass(frozen=True)
class Job:
    """A cell with all that it needs.

    Attributes:
        cell: what is to be done.
        key: where it is stored.
        identity: digests and versions.
        attack: ready to be run.
        target: the model.
        dataset: the data.
        norm: of the threat.
        keep: which adversarial samples are stored: ``"examples"``, ``"all"`` or ``"none"``.
        source: the job whose adversarial samples are judged here, or None.
        added: further jobs whose perturbations are added.
    """

    cell: Cell
    key: str
    identity: Identity
    attack: Attack
    target: Target
    dataset: Dataset
    norm: Norm
    keep: Literal["examples", "all", "none"]
    source: Job | None = None
    added: tuple[Job, ...] = ()

    @property
    def sources(self) -> tuple[Job, ...]:
        """The jobs whose adversarial samples are judged here."""
        return () if self.source is None else (self.source, *self.added)

    def chunks(self, size: int) -> list[range]:
        """Returns the sample indices of each chunk."""
        total = len(self.dataset)
        return [range(start, min(start + size, total)) for start in range(0, total, size)]


def prepare(plan: Plan, registry: Registry, where: str) -> list[Job]:
    """Loads models and data and returns a job for each cell, so that every error comes before the first attack."""
    device = _device(plan.device, where)
    expand(plan, registry, where)  # so that a misspelt name is found before data are loaded
    datasets = [make_dataset(entry, registry, where) for entry in plan.datasets]
    cells = expand(plan, registry, where, [dataset.bounds for dataset in datasets])
    models = _Models(plan, registry, where, device)
    identities: dict[tuple[str, int, str, str], Identity] = {}  # each reads source files and hashes the data
    jobs: dict[int, Job] = {}
    for cell in cells:
        number = plan.datasets.index(cell.dataset)
        dataset = datasets[number]
        model = models.of(cell.target, dataset)
        sources = [jobs[one.index] for one in cell.sources]
        place = (cell.target.name, number, cell.spec.name, cell.threat.norm)
        if place not in identities:
            identities[place] = identify(cell, model, dataset, registry)
        identity = identities[place]
        _check_goals(cell, model.target, where)
        if not sources:
            _check_offers(cell, model.target, registry, where)
        if cell.permuted and dataset.x.dim() < 4:
            problem = f"{dataset.name} has samples of shape {tuple(dataset.x.shape[1:])}, without rows and columns"
            raise PlanError(f"{where}: transfer.permuted", f"{problem}; leave it out")
        try:
            key = cell_key(cell, identity, plan.chunk, plan.batch_size, [source.key for source in sources])
            attack = registry.attack(cell.spec.name, **cell.params)
        except (InputError, TypeError, ValueError) as error:
            defaults = {name: value for name, value in cell.spec.params.items() if name in cell.params_passed}
            hint = f"; by default {defaults}" if isinstance(error, TypeError) else ""
            raise PlanError(f"{where}: {cell.label}", f"{cell.params_passed}: {error}{hint}") from error
        norm, first = registry.norm(cell.threat.norm), next(iter(sources), None)
        made = Job(
            cell, key, identity, attack, model.target, dataset, norm, _keep(plan, cell), first, tuple(sources[1:])
        )
        jobs[cell.index] = made
    _check_distinct(list(jobs.values()), where)
    return list(jobs.values())


def _keep(plan: Plan, cell: Cell) -> Literal["examples", "all", "none"]:
    """Returns what a cell stores: all where others judge it, nothing where its samples are another cell's."""
    if cell.source is not None:
        return "none"
    return plan.keep if plan.transfer is None else "all"


class _Models:
    """The models of a plan, each made once a data set."""

    def __init__(self, plan: Plan, registry: Registry, where: str, device: str) -> None:
        self._entries = {entry.name: entry for entry in plan.all_targets()}
        self._registry, self._where, self._device = registry, where, device
        self._made: dict[tuple[str, int], Model] = {}

    def of(self, entry: TargetEntry, dataset: Dataset) -> Model:
        """Returns the model of a target, and before it makes those that it is made of."""
        place = (entry.name, id(dataset))  # two data sets may have one name
        if place not in self._made:
            members = [self.of(self._entries[name], dataset) for name in entry.of or ()]
            self._made[place] = make_model(entry, dataset, self._registry, self._where, self._device, members)
        return self._made[place]


def _check_distinct(jobs: list[Job], where: str) -> None:
    """Refuses a plan that does the same twice: both would be stored in one place."""
    first: dict[str, Cell] = {}
    for job in jobs:
        other = first.setdefault(job.key, job.cell)
        if other is not job.cell:
            one, two = (f"{cell.target.name}: {cell.label}" for cell in (other, job.cell))
            problem = f"{one!r} and {two!r} are the same model, attack and parameters; remove one of them"
            raise PlanError(where, problem)


def _check_goals(cell: Cell, target: Target, where: str) -> None:
    if cell.threat.targeted and target.task != "classification":
        problem = f"a targeted threat, and {cell.target.name} is for {target.task}"
        raise PlanError(f"{where}: {cell.label}", f"{problem}; drop targeted, attacks of that task choose their goals")


def _check_offers(cell: Cell, target: Target, registry: Registry, where: str) -> None:
    if target.task not in cell.spec.tasks:
        able = [spec.name for spec in registry.specs("attack") if target.task in spec.tasks]
        names = ", ".join(able[:5]) + (f" and {len(able) - 5} more" if len(able) > 5 else "")
        problem = f"{cell.spec.name} serves {', '.join(cell.spec.tasks)}, and {cell.target.name} is for {target.task}"
        raise PlanError(f"{where}: {cell.label}", f"{problem}; use an attack on that task: {names}")
    if OFFERS.index(target.offers) < OFFERS.index(cell.spec.needs):
        problem = f"{cell.spec.name} needs {cell.spec.needs}, and {cell.target.name} offers {target.offers}"
        raise PlanError(f"{where}: {cell.label}", f"{problem}; use an attack that needs no more")


def make_model(
    entry: TargetEntry, dataset: Dataset, registry: Registry, where: str, device: str, members: Sequence[Model] = ()
) -> Model:
    """Makes a model of a plan and tries it on a sample.

    Args:
        entry: the plan's entry.
        dataset: what it is to classify.
        registry: the installed plugins.
        where: path of the plan.
        device: where it is to be.
        members: the models that it is made of.

    Raises:
        PlanError: it cannot be made, or does not fit the data.
    """
    name = f"{where}: target {entry.name}"
    with seeded_globals(0):  # weights that are drawn are the same ones each time
        target = make_target(entry, dataset, registry, where, device, [member.target for member in members])
    if target.bounds != dataset.bounds:
        raise PlanError(name, f"has bounds {target.bounds}, the data set {dataset.name} {dataset.bounds}")
    classes = count_classes(target, dataset, name)
    if target.task == "detection":
        check_computable(dataset.labels(target.task), name)
    known = replace(target, classes=classes)
    parts = [source_digest(known.module, entry, where), plugin_digest(entry, registry)]
    parts += [member.source for member in members]
    source = parts[0] if not any(parts[1:]) else hashlib.sha256("".join(parts).encode()).hexdigest()
    return Model(known, state_digest(known.module), source)


def goals(job: Job, ids: list[int], x: Tensor, y: Tensor) -> Tensor:
    """Returns the classes to be reached, never the true ones."""
    if job.source is not None:
        return goals(job.source, ids, x.to(job.source.target.device), y)
    classes = job.target.count_classes(x) - getattr(job.target.module, "extra_classes", 0)  # none is no goal
    if job.cell.goal == "next":
        return (y + 1) % classes
    if job.cell.goal == "random":
        return (y + 1 + Rng(job.cell.seed, ids).integers(classes - 1, device=y.device)) % classes
    job.target.reset(job.cell.seed)
    with torch.no_grad(), evaluation_mode(job.target.module), seeded_globals(job.cell.seed):
        logits = job.target.logits(x.clone())[:, :classes]
    return logits.scatter(1, y[:, None], float("inf")).argmin(1)


def _device(name: str, where: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise PlanError(f"{where}: device", f"expected 'auto', 'cpu', 'cuda' or 'cuda:1', got {name!r}")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise PlanError(f"{where}: device", f"{name!r} asked for, and torch sees no CUDA device; use 'cpu' or 'auto'")
    return name

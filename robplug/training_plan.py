"""A training plan: a model, data, defences and how to optimize. Read from TOML, checked before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from robplug.errors import InputError, PlanError, RobplugError
from robplug.referee.plan import read_toml
from robplug.referee.plan_tables import DatasetEntry, TargetEntry, as_number
from robplug.validation import problems


class Options(BaseModel):
    """How to optimize.

    Attributes:
        epochs: passes over the training data.
        batch_size: samples a step; the last batch of an epoch may be smaller.
        lr: learning rate at the start; None means 0.1 for sgd and 0.001 for adam.
        optimizer: ``"sgd"`` with momentum, or ``"adam"``.
        momentum: of sgd.
        weight_decay: added to the gradient of every parameter that no defence exempts.
        schedule: ``"cosine"`` to zero over all steps, ``"constant"``, or the epochs after which lr is divided by 10.
        seed: of the order of the samples, the held-out share, and every draw of model and defences.
        held_out: share of the training data that is not trained on but scored after each epoch.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:1``.
        precision: of Lightning Fabric; mixed precision runs forward passes in half.
        threads: of torch on the CPU while training; None leaves them as they are. One is fastest for small networks,
            and for any on a busy machine.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: Annotated[int, Field(ge=1)] = 10
    batch_size: Annotated[int, Field(ge=1)] = 128
    lr: Annotated[float, Field(gt=0)] | None = None
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    schedule: Literal["cosine", "constant"] | list[Annotated[int, Field(ge=1)]] = "cosine"
    seed: Annotated[int, Field(ge=0)] = 0
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
    device: str = "auto"
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    threads: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _drops_before_the_end(self) -> Options:
        if isinstance(self.schedule, list) and any(epoch >= self.epochs for epoch in self.schedule):
            raise ValueError(f"expected a schedule of epochs below {self.epochs}, got {self.schedule}")
        return self


class TrainingData(DatasetEntry):
    """The training data; as `robplug.referee.plan.DatasetEntry`, and the split is ``train`` unless another is named."""

    split: str = "train"


class DefenseEntry(BaseModel):
    """A defence; keys other than ``name`` are its parameters."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @property
    def params(self) -> dict[str, Any]:
        """The parameters given, fractions read as numbers."""
        return {key: as_number(value) for key, value in (self.model_extra or {}).items()}


def _by_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class TrainPlan(Options):
    """A training plan; the optimization's keys are those of `Options`.

    Attributes:
        model: a name of ``robplug list targets``, ``file.py:object`` or ``module:object``. A file's code is run.
        params: arguments of the model, if it is a function.
        weights: a file of weights to begin with, such as another training's ``weights.safetensors``.
        dataset: a name, or a table with ``name``, ``split``, ``root``, ``samples`` and ``params``.
        defenses: names, or tables with ``name`` and the defence's parameters.
        out: folder of the weights.
    """

    model: str
    params: dict[str, Any] = Field(default_factory=dict)
    weights: str | None = None
    dataset: Annotated[TrainingData, BeforeValidator(_by_name)]
    defenses: list[Annotated[DefenseEntry, BeforeValidator(_by_name)]] = Field(default_factory=list)
    out: str

    @property
    def options(self) -> dict[str, Any]:
        """How to optimize, as arguments of `robplug.training.fit`."""
        return {key: getattr(self, key) for key in Options.model_fields}


def read_options(options: dict[str, Any]) -> Options:
    """Checks options given in Python.

    Raises:
        InputError: one does not exist or does not fit.
    """
    try:
        return Options.model_validate(options)
    except ValidationError as error:
        raise InputError("options of training that fit", problems(error, {"": Options})) from None


def load_train_plan(path: str | Path) -> TrainPlan:
    """Reads and checks a training plan.

    Raises:
        PlanError: the file is missing or no TOML, a key is unknown or missing, or a value does not fit.
    """
    content = read_toml(Path(path))
    if "targets" in content and "model" not in content:
        raise PlanError(str(path), "this looks like a plan of attacks: robplug run runs it")
    try:
        return TrainPlan.model_validate(content)
    except ValidationError as error:
        raise PlanError(str(path), problems(error, {"": TrainPlan, "dataset": TrainingData})) from None


def run_train_plan(
    path: str | Path, progress: bool = True, tune: str | None = None, tolerance: float | None = None
) -> Path:
    """Trains what a plan describes; goes on from the checkpoint that an interrupted run has left.

    Where the same training was finished in the plan's ``out`` before, nothing is trained.

    Args:
        path: a TOML file.
        progress: print a line for each epoch.
        tune: the factor of a penalty, ``NAME.FIELD``, that `robplug.tuning.choose` is to choose first.
        tolerance: of that choice; None means `robplug.tuning.TOLERANCE`.

    Returns:
        The file of the weights.

    Raises:
        PlanError: the plan cannot be run; nothing has been trained then.
        InputError: what is to be tuned does not exist, or cannot be.
        StoreError: the plan's ``out`` has another training, finished or not.
        KeyboardInterrupt: Ctrl-C, after a checkpoint was written.
    """
    from robplug.isolation import seeded_globals
    from robplug.plugins import registry
    from robplug.referee.digests import state_digest
    from robplug.referee.load import count_classes, make_dataset, make_target
    from robplug.training import fit
    from robplug.training_record import WEIGHTS
    from robplug.training_setup import sub_seed
    from robplug.tuning import TOLERANCE, choose
    from robplug.tuning_field import find_defense, with_value

    plan, where = load_train_plan(path), str(path)
    dataset = make_dataset(plan.dataset, registry(), where)
    entry = TargetEntry(name=plan.model, params=plan.params, weights=plan.weights)
    with seeded_globals(sub_seed(plan.seed, "model")):
        target = make_target(entry, dataset, registry(), where, "cpu")
    count_classes(target, dataset, f"{where}: model {plan.model}")
    model = target.module
    try:
        defenses = [registry().defense(entry.name, **entry.params) for entry in plan.defenses]
    except RobplugError as error:
        raise PlanError(f"{where}: defenses", str(error)) from error
    origin: dict[str, Any] = {"params": repr(plan.params), "state": state_digest(model)}
    if tune is not None:
        place, field = find_defense([entry.name for entry in plan.defenses], tune)
        how: dict[str, Any] = {"out": plan.out, "tolerance": TOLERANCE if tolerance is None else tolerance}
        found = choose(model, dataset, defenses, place, field, progress=progress, origin=origin, **how, **plan.options)
        defenses, origin["tuning"] = with_value(defenses, place, field, found["choice"]), found
    fit(model, dataset, defenses, out=plan.out, resume=True, progress=progress, origin=origin, **plan.options)
    return Path(plan.out) / WEIGHTS

"""The public functions; `robplug` re-exports them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from robplug.plugins import registry
from robplug.types import Attack, AttackSpec, DatasetSpec, DefenseSpec, NormSpec, TargetSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from robplug.data import Dataset
    from robplug.referee.results import Results
    from robplug.targets import Target


def attack(name: str, **params: Any) -> Attack:
    """Makes an attack.

    Args:
        name: as in ``robplug list attacks``.
        **params: its parameters; what is not given has its default.

    Raises:
        UnknownNameError: no plugin has it.
        InputError: it has no such parameter.

    Example:
        >>> import robplug
        >>> robplug.attack("robplug/pgd", steps=7).steps
        7
    """
    return registry().attack(name, **params)


def defense(name: str, **params: Any) -> Any:
    """Makes a defence for `train`.

    Args:
        name: as in ``robplug list defenses``.
        **params: its parameters.

    Raises:
        UnknownNameError: no plugin has it.
        InputError: it has no such parameter.

    Example:
        >>> import robplug
        >>> robplug.defense("robplug/at", eps=0.1).eps
        0.1
    """
    return registry().defense(name, **params)


def target(model: Any, **options: Any) -> Target:
    """Turns a model into a target of attacks.

    Args:
        model: an nn.Module, an ART ``PyTorchClassifier``, a Foolbox ``PyTorchModel``, a name of
            ``robplug list targets``, or a list of these, which are one target together (`robplug.ensembles.ensemble`).
        **options: for an nn.Module those of `robplug.targets.from_module`, such as ``bounds=(0, 1)``; for a list
            also ``weights`` and ``fuse``.

    Raises:
        InputError: no plugin accepts an object of this class.

    Example:
        >>> import robplug, torch
        >>> robplug.target(torch.nn.Flatten(), bounds=(-1, 1)).bounds
        (-1.0, 1.0)
    """
    from robplug.targets import Target

    if not isinstance(model, str):
        return registry().target(model, **options)
    made, task = registry().named_target(model), registry().spec("target", model).task
    if task != "classification" and not isinstance(made, Target):
        options = {"task": task, **options}
    return registry().target(made, **options)


def dataset(name: str, **params: Any) -> Dataset:
    """Loads a data set.

    Args:
        name: as in ``robplug list datasets``.
        **params: such as ``split="test"`` and ``root="folder"``.

    Example:
        >>> import robplug
        >>> robplug.dataset("digits", split="test").x.shape[1:]
        torch.Size([1, 8, 8])
    """
    return registry().dataset(name, **params)


def list_attacks() -> list[AttackSpec]:
    """Returns the installed attacks' Specs, by name; imports no attack library.

    Example:
        >>> import robplug
        >>> "robplug/pgd" in [spec.name for spec in robplug.list_attacks()]
        True
    """
    return registry().specs("attack")


def list_defenses() -> list[DefenseSpec]:
    """Returns the installed defences' Specs, by name.

    Example:
        >>> import robplug
        >>> "robplug/at" in [spec.name for spec in robplug.list_defenses()]
        True
    """
    return registry().specs("defense")


def list_targets() -> list[TargetSpec]:
    """Returns the installed models' Specs, by name.

    Example:
        >>> import robplug
        >>> "robplug/module" in [spec.name for spec in robplug.list_targets()]
        True
    """
    return registry().specs("target")


def list_datasets() -> list[DatasetSpec]:
    """Returns the installed data sets' Specs, by name.

    Example:
        >>> import robplug
        >>> "digits" in [spec.name for spec in robplug.list_datasets()]
        True
    """
    return registry().specs("dataset")


def list_norms() -> list[NormSpec]:
    """Returns the installed norms' Specs, by name.

    Example:
        >>> import robplug
        >>> "linf" in [spec.name for spec in robplug.list_norms()]
        True
    """
    return registry().specs("norm")


def evaluate(plan: Mapping[str, Any] | str | Path, out: str | Path | None = None) -> Results:
    """Runs a plan through the referee; what ``robplug run`` calls.

    Args:
        plan: path of a TOML file, or its content as a mapping.
        out: run directory, instead of the plan's own.

    Returns:
        The results, from which ``table()``, ``rows()`` and ``report(path)`` follow.

    Raises:
        PlanError: the plan cannot be run; nothing has been run then.
        StoreError: the run directory cannot be used.

    Example:
        >>> import robplug, tempfile
        >>> plan = {
        ...     "targets": [{"name": "robplug/digits-standard"}],
        ...     "datasets": [{"name": "digits", "samples": 8}],
        ...     "threats": [{"norm": "linf", "eps": 0.1}],
        ...     "attacks": [{"name": "robplug/fgsm"}],
        ... }
        >>> with tempfile.TemporaryDirectory() as out:
        ...     len(robplug.evaluate(plan, out=out).rows())
        8
    """
    from robplug.referee.run import run_plan

    return run_plan(plan, registry(), out=out)


def train(model: nn.Module, dataset: Dataset, defenses: Any = (), **options: Any) -> nn.Module:
    """Trains a model with a stack of defences; see `robplug.training.fit` for the options.

    Args:
        model: trained in place.
        dataset: the training data.
        defenses: a name, a defence, or a list of either.
        **options: ``epochs=``, ``batch_size=``, ``lr=``, ``seed=``, ``out=`` and more.

    Returns:
        The trained model, after every defence's ``finish``.

    Example:
        >>> import robplug, torch
        >>> digits = robplug.dataset("digits", split="train").head(64)
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> robplug.train(net, digits, ["robplug/none"], epochs=1) is net
        True
    """
    from robplug.training import fit

    return fit(model, dataset, defenses, **options)

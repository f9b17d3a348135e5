"""Defences of robplug as ART trainers for ``PyTorchClassifier``.

Batches go through the same `robplug.defenses.Stack` as in `robplug.training.fit`; optimizer, loss and preprocessing are
the estimator's own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from art.data_generators import DataGenerator
from art.defences.trainer import Trainer
from art.estimators.classification import PyTorchClassifier
from art.utils import check_and_transform_label_format
from torch import Tensor, nn

from robplug.defenses import Defense, Stack
from robplug.errors import InputError
from robplug.isolation import seeded_globals
from robplug.plugins import registry
from robplug.rng import Rng
from robplug.step import Loss, Step
from robplug.targets import evaluation_mode
from robplug.training_setup import sub_seed

LOSSES = (nn.CrossEntropyLoss, nn.NLLLoss, nn.MultiMarginLoss)


def make_trainer(
    defenses: str | Defense | Iterable[str | Defense], estimator: PyTorchClassifier, *, seed: int = 0, **params: Any
) -> DefenseTrainer:
    """Makes an ART trainer of a defence, or of a stack of them.

    Args:
        defenses: names of ``robplug list defenses``, defences, or both.
        estimator: trained in place, by its own optimizer and loss.
        seed: of the order of the samples and of every draw.
        **params: parameters of the defence, if ``defenses`` is one name.

    Raises:
        InputError: defences or estimator do not fit.
    """
    if isinstance(defenses, str):
        return DefenseTrainer(estimator, registry().defense(defenses, **params), seed)
    if params:
        remedy = "make each with robplug.defense(name, ...)"
        raise InputError("parameters only with one name", ", ".join(params), remedy)
    return DefenseTrainer(estimator, defenses, seed)


class DefenseTrainer(Trainer):  # type: ignore[misc]
    """Trains an estimator with a stack of defences.

    Args:
        classifier: the estimator.
        defenses: names, defences, or both.
        seed: of the order of the samples and of every draw; each call of `fit` goes on with new ones.

    Raises:
        InputError: defences or estimator do not fit.
    """

    def __init__(
        self, classifier: PyTorchClassifier, defenses: str | Defense | Iterable[str | Defense], seed: int = 0
    ) -> None:
        _check_estimator(classifier)
        super().__init__(classifier)
        self._defenses = Stack(defenses).defenses
        if any(defense.patience is not None for defense in self._defenses):
            raise InputError("patience=None in an ART trainer, which holds no samples out", "a patience")
        self._seed = seed
        self._epochs = 0
        self._steps = 0

    def fit(
        self,
        x: np.ndarray[Any, Any],
        y: np.ndarray[Any, Any],
        batch_size: int = 128,
        nb_epochs: int = 20,
        **kwargs: Any,
    ) -> None:
        """Trains on arrays.

        Args:
            x: (N, ...) samples inside the estimator's clip_values.
            y: (N,) labels or (N, C) one-hot.
            batch_size: samples a step; the last batch of an epoch may be smaller.
            nb_epochs: passes over the data.
            **kwargs: none is supported.

        Raises:
            InputError: arguments that do not fit.
        """
        _refuse(kwargs)
        with self._session() as train:
            for _ in range(nb_epochs):
                order = np.random.default_rng(sub_seed(self._seed, "order", self._epochs)).permutation(len(x))
                for start in range(0, len(x), batch_size):
                    rows = order[start : start + batch_size]
                    train(x[rows], y[rows])
                self._epochs += 1

    def fit_generator(self, generator: DataGenerator, nb_epochs: int = 20, **kwargs: Any) -> None:
        """Trains on the batches of an ART data generator.

        Args:
            generator: must know its size.
            nb_epochs: passes over the data, of size / batch_size batches each, rounded up.
            **kwargs: none is supported.

        Raises:
            InputError: arguments that do not fit.
        """
        _refuse(kwargs)
        if generator.size is None:
            raise InputError("a generator that knows its size", "size=None")
        with self._session() as train:
            for _ in range(nb_epochs * math.ceil(generator.size / generator.batch_size)):
                train(*generator.get_batch())

    @contextmanager
    def _session(self) -> Iterator[Any]:
        """Prepares the model, yields a function that trains on one batch, and finishes the model."""
        model, optimizer = self._classifier.model, self._classifier.optimizer
        bounds, loss = _bounds(self._classifier), _per_sample(self._classifier.loss)
        stack = Stack(self._defenses)
        with evaluation_mode(model):
            with seeded_globals(sub_seed(self._seed, "prepare")):
                stack.prepare(model)
            with _enlisted(optimizer, stack):
                network = _Network(self._classifier)
                network.train()
                stack.train_mode()

                def train(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> None:
                    rng = Rng(sub_seed(self._seed, "step", self._steps), range(len(x)))
                    step = Step(network, *self._tensors(x, y), rng, bounds, loss_of=loss)
                    with seeded_globals(rng.batch_seed()):
                        stack.train_batch(step, optimizer)
                    self._steps += 1

                try:
                    yield train
                finally:
                    finished = stack.finish()
        if finished is not model:
            raise InputError("a finish that returns the estimator's own model", "another module", "use robplug.train")

    def _tensors(self, x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor]:
        if y.ndim == 2 and not np.isin(y, (0, 1)).all():
            raise InputError("labels, or one-hot labels", "probabilities", "pass class numbers")
        labels = check_and_transform_label_format(y, nb_classes=self._classifier.nb_classes).argmax(axis=1)
        device = self._classifier.device
        return torch.from_numpy(x.astype(np.float32)).to(device), torch.from_numpy(labels.astype(np.int64)).to(device)


class _Network(nn.Module):
    """The estimator's preprocessing, as in its own training or prediction, and its model."""

    def __init__(self, estimator: PyTorchClassifier) -> None:
        super().__init__()
        self.model = estimator.model
        self._preprocess = estimator._apply_preprocessing

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self._preprocess(x, y=None, fit=self.training, no_grad=False)
        return self.model(x)  # type: ignore[no-any-return]


@contextmanager
def _enlisted(optimizer: torch.optim.Optimizer, stack: Stack) -> Iterator[None]:
    """Inside, the optimizer has the new parameters and the exemptions from weight decay; state of others is kept.

    New parameters that are still in the model afterwards stay in the optimizer.
    """
    own = [(group, list(group["params"])) for group in optimizer.param_groups]
    exempt = {id(parameter) for parameter in stack.no_decay}
    for group, parameters in own:
        group["params"] = [parameter for parameter in parameters if id(parameter) not in exempt]
        _add(optimizer, group, [parameter for parameter in parameters if id(parameter) in exempt], decay=False)
    known = {id(parameter) for _, parameters in own for parameter in parameters}
    new = [parameter for parameter in stack.new_parameters if id(parameter) not in known]
    _add(optimizer, own[0][0], [parameter for parameter in new if id(parameter) not in exempt])
    _add(optimizer, own[0][0], [parameter for parameter in new if id(parameter) in exempt], decay=False)
    try:
        yield
    finally:
        inside = {id(parameter) for parameter in stack.model.parameters()}
        added = optimizer.param_groups[len(own) :]
        del optimizer.param_groups[len(own) :]
        for group, parameters in own:
            group["params"] = parameters
        for group in added:
            group["params"] = [p for p in group["params"] if id(p) in inside and id(p) not in known]
            optimizer.param_groups.extend([group] if group["params"] else [])
        for parameter in [p for p in optimizer.state if id(p) not in inside | known]:
            del optimizer.state[parameter]


def _add(
    optimizer: torch.optim.Optimizer, like: dict[str, Any], parameters: list[nn.Parameter], decay: bool = True
) -> None:
    """Adds a group with the settings of another one."""
    if parameters:
        settings = {key: value for key, value in like.items() if key != "params"}
        if not decay and "weight_decay" in settings:
            settings["weight_decay"] = 0.0
        optimizer.add_param_group({**settings, "params": parameters})


def _check_estimator(estimator: Any) -> None:
    if not isinstance(estimator, PyTorchClassifier):
        raise InputError("an ART PyTorchClassifier", f"a {type(estimator).__name__}")
    if estimator.optimizer is None:
        raise InputError("an estimator with an optimizer", "optimizer=None")
    if estimator.use_amp:
        raise InputError("an estimator without apex", "use_amp=True", "use robplug.train(precision='16-mixed')")
    if not estimator.all_framework_preprocessing:
        names = ", ".join(type(step).__name__ for step in estimator.preprocessing_operations)
        remedy = "use the PyTorch versions of the preprocessing defences"
        raise InputError("preprocessing that PyTorch can differentiate", names, remedy)
    _bounds(estimator)
    _per_sample(estimator.loss)


def _bounds(estimator: PyTorchClassifier) -> tuple[float, float]:
    clip = estimator.clip_values
    if clip is None or any(np.ptp(np.asarray(value)) > 0 for value in clip):
        raise InputError("an estimator with one smallest and one largest clip value", f"clip_values={clip}")
    return float(np.max(clip[0])), float(np.max(clip[1]))


def _per_sample(loss: nn.Module) -> Loss:
    """Returns the estimator's loss for each sample; its mean is the estimator's own."""
    plain = getattr(loss, "weight", None) is None and getattr(loss, "ignore_index", -100) < 0
    if not isinstance(loss, LOSSES) or loss.reduction != "mean" or not plain:
        names = ", ".join(kind.__name__ for kind in LOSSES)
        raise InputError(f"one of the losses {names} with reduction='mean' and all samples alike", repr(loss))
    separate = copy.copy(loss)
    separate.reduction = "none"
    return lambda logits, y: separate(logits.float(), y)


def _refuse(kwargs: dict[str, Any]) -> None:
    if kwargs:
        remedy = "call fit with nb_epochs=1 and step a scheduler in between"
        raise InputError("fit with x, y, batch_size and nb_epochs only", ", ".join(kwargs), remedy)

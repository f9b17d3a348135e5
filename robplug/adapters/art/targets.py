"""ART's PyTorchClassifier as a target."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from art.defences.preprocessor.preprocessor import PreprocessorPyTorch
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

from robplug.errors import InputError
from robplug.targets import Substitute, Target, from_module

OWN = ("bounds", "classes", "offers", "transform")


def from_estimator(estimator: PyTorchClassifier, *, backward: str | None = None, **options: Any) -> Target:
    """Makes a Target whose logits are what ``estimator.predict`` gives.

    Its ``clip_values``, ``preprocessing``, ``preprocessing_defences`` and ``postprocessing_defences`` are honoured.
    Those that compute with PyTorch keep their gradient; those that compute with numpy have none, and the target then
    offers scores only.

    Args:
        estimator: what is attacked; its mode is left as it is.
        backward: ``"identity"`` lets gradients pass what has none as if it were not there (BPDA; Athalye et al. 2018,
            section 4.1), so that the target offers gradients.
        **options: ``stochastic``, ``eot`` and ``draws`` of `robplug.targets.from_module`.

    Raises:
        InputError: the estimator has no single lower and upper clip value, predicts in a way of its own, or an option
            contradicts it.
    """
    for name in OWN:
        if name in options:
            raise InputError(f"the {name} of the estimator itself", f"{name}={options[name]!r}", f"leave {name} out")
    if type(estimator).predict is not PyTorchClassifier.predict:
        remedy = "pass robplug.target an nn.Module that does the same"
        raise InputError("an estimator that predicts as PyTorchClassifier does", type(estimator).__qualname__, remedy)
    operations = [operation for operation in estimator.preprocessing_operations if operation.apply_predict]
    afterwards = [defence for defence in estimator.postprocessing_defences or () if defence.apply_predict]
    smooth = all(isinstance(operation, PreprocessorPyTorch) for operation in operations) and not afterwards
    if backward not in (None, "identity"):
        raise InputError('backward to be "identity"', repr(backward))
    if backward is not None and smooth:
        raise InputError("a defence without gradient, for backward to replace", "none", "leave backward out")
    module = _Estimator(estimator.model, operations, afterwards, backward is not None)
    offers = "gradients" if smooth or backward else "scores"
    return from_module(module, bounds=_bounds(estimator), classes=estimator.nb_classes, offers=offers, **options)


def _bounds(estimator: PyTorchClassifier) -> tuple[float, float]:
    if estimator.clip_values is None:
        remedy = "pass clip_values=(low, high) to PyTorchClassifier"
        raise InputError("an estimator with clip_values, the bounds of its samples", None, remedy)
    low, high = (np.unique(value) for value in estimator.clip_values)
    if len(low) != 1 or len(high) != 1:
        raise InputError("one lower and one upper clip value", estimator.clip_values, "give all features the same")
    return float(low[0]), float(high[0])


class _Estimator(nn.Module):
    """The network between the pre- and the postprocessing of an estimator."""

    def __init__(self, model: nn.Module, before: list[Any], after: list[Any], identity: bool) -> None:
        super().__init__()
        self.model = model
        self._before = before
        self._after = after
        self._identity = identity

    def forward(self, x: Tensor) -> Tensor:
        for operation in self._before:
            if isinstance(operation, PreprocessorPyTorch):
                x, _ = operation.forward(x)
            else:
                x = self._numpy(lambda array, apply=operation: apply(array)[0], x)
        logits: Tensor = self.model(x)
        return functools.reduce(lambda values, defence: self._numpy(defence, values), self._after, logits)

    def _numpy(self, function: Any, tensor: Tensor) -> Tensor:
        array = function(tensor.detach().cpu().numpy().copy())
        value = torch.from_numpy(np.asarray(array)).to(tensor)
        if not self._identity:
            return value
        if value.shape != tensor.shape:
            remedy = "leave backward out, or use another attack"
            raise InputError("a defence that keeps the shape, for the identity backward", tuple(value.shape), remedy)
        return Substitute.apply(value, tensor)  # type: ignore[no-any-return, no-untyped-call]

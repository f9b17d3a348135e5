"""robplug's attacks as attacks of ART."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from art.attacks.attack import EvasionAttack
from art.estimators.classification import PyTorchClassifier
from art.estimators.classification.classifier import ClassifierMixin
from art.estimators.estimator import BaseEstimator, LossGradientsMixin
from art.estimators.object_detection import PyTorchObjectDetector
from art.estimators.object_detection.object_detector import ObjectDetectorMixin
from torch import Tensor, nn

from robplug.adapters.common import check_exportable
from robplug.errors import InputError, ThreatError
from robplug.plugins import registry
from robplug.rng import Rng
from robplug.targets import OFFERS, Target, evaluation_mode
from robplug.tasks import PADDING
from robplug.types import AttackSpec, ThreatModel

OWN = ("eps", "norm", "targeted", "batch_size", "seed", "backward")
"""The export's own parameters, beside those of the attack."""
NORMS: dict[Any, str] = {np.inf: "linf", "inf": "linf", 2: "l2", 1: "l1"}
"""ART's names of norms, which are taken as well."""
PIXEL_NORMS = frozenset({"linf", "l2", "l1", "l0"})
ESTIMATORS: dict[str, tuple[type[Any], ...]] = {
    "classification": (ClassifierMixin, PyTorchClassifier),
    "detection": (ObjectDetectorMixin, PyTorchObjectDetector),
}
"""What an estimator of a task is derived from."""


def make_attack(name: str, estimator: PyTorchClassifier | PyTorchObjectDetector, **params: Any) -> RobplugAttack:
    """Makes the export; see `robplug.adapters.art.attack`."""
    spec: AttackSpec = registry().spec("attack", name)
    check_exportable(spec, "ART", tuple(ESTIMATORS))
    clash = sorted(set(OWN) & set(spec.params))
    if clash:
        raise InputError(f"an attack without parameters called {', '.join(OWN)}", f"{name} with {', '.join(clash)}")
    return RobplugAttack(estimator, spec, params)


class RobplugAttack(EvasionAttack):  # type: ignore[misc]
    """A robplug attack.

    The network is attacked in eval mode and has its own mode afterwards. Random numbers are seeded once and differ from
    call to call; those of a sample do not depend on ``batch_size``.

    Args:
        estimator: a classifier or an object detector of a PyTorch network.
        spec: of the attack.
        params: those in ``OWN`` and the attack's own; ``set_params`` changes any of them.
    """

    eps: float | None
    norm: str
    batch_size: int
    seed: int
    backward: str | None

    def __init__(
        self, estimator: PyTorchClassifier | PyTorchObjectDetector, spec: AttackSpec, params: dict[str, Any]
    ) -> None:
        self.spec = spec
        served = [task for task in ESTIMATORS if task in spec.tasks]
        fits = [task for task in served if isinstance(estimator, ESTIMATORS[task])]
        self.task = (fits or served)[0]
        self.attack_params = [*EvasionAttack.attack_params, *OWN, *spec.params]
        gradients = (LossGradientsMixin,) if spec.needs == "gradients" else ()
        self._estimator_requirements = (BaseEstimator, *gradients, *ESTIMATORS[self.task])
        super().__init__(estimator=estimator)
        defaults = {"eps": None, "norm": spec.norms[0], "targeted": not spec.untargeted, "batch_size": 32, "seed": 0}
        self.set_params(**{**defaults, "backward": None, **spec.params, **params})

    def set_params(self, **kwargs: Any) -> None:
        """Changes parameters, after checks; a ``seed`` starts the random numbers anew.

        Raises:
            InputError: there is no such parameter, or a value does not fit.
            ThreatError: the attack does not serve norm, eps or targeted.
        """
        for key in kwargs:
            if key not in self.attack_params:
                remedy = f"it has {', '.join(self.attack_params)}"
                raise InputError(f"a parameter of {self.spec.name}", repr(key), remedy)
        super().set_params(**kwargs)
        if "seed" in kwargs:
            self._rng = Rng(self.seed, ())

    def _check_params(self) -> None:
        super()._check_params()
        for key, least in (("batch_size", 1), ("seed", 0)):
            value = getattr(self, key)
            if not isinstance(value, int) or value < least:
                raise InputError(f"{key} to be an integer >= {least}", repr(value))
        self.norm = NORMS.get(self.norm, self.norm)
        self._check_threat()
        self._attack = registry().attack(self.spec.name, **{key: getattr(self, key) for key in self.spec.params})
        self._target()

    def _check_threat(self) -> None:
        spec = self.spec
        if self.norm not in spec.norms:
            raise ThreatError(f"expected a norm that {spec.name} serves ({', '.join(spec.norms)}), got {self.norm!r}")
        if (self.eps is None) != (spec.budget == "minimal"):
            want = "no eps: it looks for the smallest distance" if spec.budget == "minimal" else "eps, its radius"
            raise ThreatError(f"{spec.name}: expected {want}, got eps={self.eps}")
        if self.targeted not in (True, False) or not (spec.targeted if self.targeted else spec.untargeted):
            raise ThreatError(f"expected a threat that {spec.name} serves, got targeted={self.targeted!r}")
        ThreatModel(self.norm, self.eps)

    def _target(self) -> Target:
        target = registry().target(self.estimator, **({} if self.backward is None else {"backward": self.backward}))
        if OFFERS.index(target.offers) < OFFERS.index(self.spec.needs):
            remedy = (
                'its defences have none: pass backward="identity" to let gradients pass them, or use another attack'
            )
            raise InputError(f"an estimator with {self.spec.needs}", f"one with {target.offers}", remedy)
        return target

    def generate(self, x: np.ndarray, y: Any = None, **kwargs: Any) -> np.ndarray:
        """Attacks a batch.

        Args:
            x: (N, ...) floating-point samples inside the clip values.
            y: (N,) or (N, 1) classes, or (N, C) with the largest value at the class: the true ones, or the goals of a
                targeted attack. Of a detector a list of N dicts with ``boxes`` (M, 4) and ``labels`` (M,), all of which
                count whatever their ``scores``. None means the estimator's own predictions, a detector's from .5 on.
            **kwargs: ``mask``, broadcastable to x, is 0 or False where a value must stay as it is. The attack then sees
                a network for which the value is the clean one whatever it tries, one sample at a time, which is slow;
                it needs a norm of pixels, and a classifier.

        Returns:
            x_adv, with shape and dtype of x.

        Raises:
            InputError: an argument does not fit.
        """
        mask = kwargs.pop("mask", None)
        if mask is not None and self.task != "classification":
            raise InputError(f"no mask for {self.task}", "one", "leave mask out")
        free = _free(mask, x, self.norm)
        if kwargs:
            raise InputError("no argument but x, y and mask", ", ".join(kwargs), "leave it out")
        if y is None and self.targeted:
            raise InputError("y, the classes to reach", None, "pass y, or set targeted=False")
        target = self._target()
        inputs = torch.from_numpy(np.array(x)).to(target.device)
        inputs = inputs.to(target.dtype) if inputs.is_floating_point() else inputs  # refused by the attack
        read = _classes if self.task == "classification" else _boxes
        labels = None if y is None else torch.from_numpy(read(y, len(x))).to(target.device)
        rng, size = self._rng.next_call(len(x)), self.batch_size if free is None else 1
        x_adv = inputs.clone()
        with evaluation_mode(target.module):
            for start in range(0, len(x), size):
                rows = torch.zeros(len(x), dtype=torch.bool)
                rows[start : start + size] = True
                y_rows = None if labels is None else labels[rows]
                if free is None:
                    x_adv[rows] = self._run(target, inputs[rows], y_rows, rng.select(rows))
                else:
                    x_adv[rows] = self._run_masked(target, inputs[rows], y_rows, rng.select(rows), free[rows])
        if inputs.cpu().numpy().dtype == x.dtype:
            return x_adv.cpu().numpy()
        return x + (x_adv - inputs).cpu().numpy().astype(x.dtype)  # type: ignore[no-any-return]

    def _run(self, target: Target, x: Tensor, labels: Tensor | None, rng: Rng) -> Tensor:
        threat = ThreatModel(self.norm, self.eps, target.bounds, self.targeted)
        y, y_goal = (None, labels) if self.targeted else (labels, None)
        return self._attack.run(target, x, y, threat, rng, y_goal=y_goal).x_adv

    def _run_masked(self, target: Target, x: Tensor, labels: Tensor | None, rng: Rng, free: Tensor) -> Tensor:
        free = free.to(x.device)
        masked = dataclasses.replace(target, module=_Masked(target.module, x, free))
        return torch.where(free, self._run(masked, x, labels, rng), x)


class _Masked(nn.Module):
    """The network, with one clean sample in place of whatever is not free to change."""

    def __init__(self, module: nn.Module, clean: Tensor, free: Tensor) -> None:
        super().__init__()
        self.module = module
        self._clean = clean
        self._free = free

    def forward(self, x: Tensor) -> Tensor:
        return self.module(torch.where(self._free, x, self._clean))  # type: ignore[no-any-return]


def _free(mask: np.ndarray | None, x: np.ndarray, norm: str) -> Tensor | None:
    """Returns what may change, bool with the shape of x; None for all."""
    if mask is None:
        return None
    if norm not in PIXEL_NORMS:
        remedy = "leave mask out, or use an attack under a norm of pixels"
        raise InputError(f"no mask under the norm {norm}, whose changes are not those of single values", "one", remedy)
    try:
        wide = np.broadcast_to(mask, x.shape)
    except ValueError:
        raise InputError(f"a mask broadcastable to x of shape {x.shape}", np.shape(mask)) from None
    if wide.dtype != bool and not (wide >= 0).all():
        raise InputError("a mask of values >= 0 or bool", f"a smallest value of {wide.min()}")
    return torch.from_numpy(wide != 0)


def _classes(y: np.ndarray, count: int) -> np.ndarray:
    """Returns (N,) int64 of classes in any of ART's forms."""
    array = np.asarray(y)
    classes = array.argmax(1) if array.ndim == 2 and array.shape[1] > 1 else array.reshape(-1)
    if classes.shape != (count,) or (classes != classes.astype(np.int64)).any():
        raise InputError(f"y of {count} classes, as numbers or one-hot", f"shape {array.shape} {array.dtype}")
    return classes.astype(np.int64)


def _boxes(y: Sequence[Mapping[str, Any]], count: int) -> np.ndarray:
    """Returns (N, M, 5) float32 rows x1, y1, x2, y2, label of ART's labels for detectors, padded with label -1."""
    parts = []
    for one in y:
        if not (isinstance(one, Mapping) and {"boxes", "labels"} <= one.keys()):
            raise InputError("y of dicts with boxes and labels", sorted(one) if isinstance(one, Mapping) else one)
        boxes, labels = (np.asarray(one[key], dtype=np.float32) for key in ("boxes", "labels"))
        if labels.ndim != 1 or (boxes.shape != (len(labels), 4) and (boxes.size or len(labels))):
            raise InputError(f"boxes of shape ({labels.size}, 4), one for each label", boxes.shape)
        parts.append(np.concatenate([boxes.reshape(-1, 4), labels[:, None]], axis=1))
    if len(parts) != count:
        raise InputError(f"y of {count} dicts, one for each image", len(parts))
    padded = np.full((count, max(map(len, parts), default=0), 5), PADDING, dtype=np.float32)
    for rows, part in zip(padded, parts, strict=True):
        rows[: len(part)] = part
    return padded

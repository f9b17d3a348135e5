"""The attacks of ART, run on a robplug target.

What is done to a class of ART, beyond calling it:

- The network is put in a plain module. ART would call the children of an ``nn.Sequential`` one by one and pass by its
  hooks, and some attacks feed float64.
- The loss is summed over the batch. ART's default, the mean, shrinks each gradient with the size of the batch, down to
  constants such as 1e-7 that some attacks add to its norm.
- Classes that know only images in [0, 1] run there, whatever the bounds: samples, radius and network are mapped, and
  lengths among their parameters are on that scale. All others take lengths in units of the data, as in ART.
- Classes that go through a batch sample by sample get one at a time, with random numbers of its own: what HopSkipJump
  finds would else depend on how many samples went before. Their batch size, which counts queries, stays ART's.
- Boundary attack and HopSkipJump draw their starts from the operating system's entropy; they are given starts, drawn
  the same way from the sample's own stream.
- SpatialTransformation is told of its images in another way, see spatial.py.
- What the float32 rounding of ART's last addition put beyond the bounds is put back on them.

ART makes no claim of success.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

from robplug.adapters.common import ForeignAttack, make_attack_class
from robplug.adapters.unit_box import ROUNDING, to_unit, unit_eps, without_rounding
from robplug.attacks import radius
from robplug.errors import InputError, ThreatError
from robplug.inputs import check_batch
from robplug.isolation import ModuleState, seeded_globals
from robplug.targets import OFFERS, Target, evaluation_mode
from robplug.types import Perturbed, ThreatModel

if TYPE_CHECKING:
    from robplug.rng import Rng

NORMS = {"linf": np.inf, "l2": 2, "l1": 1}
UNIT_BOX = frozenset(
    {"AutoAttack", "CarliniL0Method", "CarliniLInfMethod", "DeepFool", "ElasticNet", "PixelAttack", "SignOPTAttack"}
    | {"TargetedUniversalPerturbation", "ThresholdAttack", "UniversalPerturbation", "VirtualAdversarialMethod"}
    | {"ZooAttack"}
)
"""Classes with constants, clipping or tolerances meant for [0, 1], or that run such a class."""
STARTED = frozenset({"BoundaryAttack", "HopSkipJump"})
EVOLUTION = frozenset({"PixelAttack", "ThresholdAttack"})
ONE_BY_ONE = STARTED | EVOLUTION | {"SignOPTAttack", "SimBA", "SpatialTransformation", "ZooAttack"}
PROBABILITIES = EVOLUTION | {"NewtonFool", "SimBA", "VirtualAdversarialMethod"}
"""Classes made for networks that give probabilities instead of logits."""
IMAGES = frozenset(
    {"AutoAttack", "CarliniL0Method", "PixelAttack", "SimBA", "SpatialTransformation", "SquareAttack"}
    | {"ThresholdAttack"}
)
"""Classes that need samples of shape (C, H, W)."""


class ArtAttack(ForeignAttack):
    """Base of the classes made from the catalogue."""

    def run(
        self,
        target: Target,
        x: Tensor,
        y: Tensor | None,
        threat: ThreatModel,
        rng: Rng,
        *,
        y_goal: Tensor | None = None,
    ) -> Perturbed:
        """Attacks a batch; see `robplug.types.Attack.run`. There is no claim: the library makes none."""
        self._check(target, x, threat)
        before = ModuleState(target.module)
        try:
            with evaluation_mode(target.module), _on_device(x):
                labels = check_batch(target, x, y, threat, y_goal)
                if len(x) == 0 or (self.entry["budget"] == "fixed" and radius(threat) == 0):
                    return Perturbed(x.clone())
                alone = torch.eye(len(x), dtype=torch.bool)
                rows = alone if self._name in ONE_BY_ONE else torch.ones(1, len(x), dtype=torch.bool)
                parts = [self._attack(target, x[row], labels[row], threat, rng.select(row)) for row in rows]
        finally:
            before.restore()
        witness = [part.witness for part in parts if part.witness is not None]
        return Perturbed(torch.cat([part.x_adv for part in parts]), torch.cat(witness) if witness else None)

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _check(self, target: Target, x: Tensor, threat: ThreatModel) -> None:
        name, needs = self.entry["name"], self.entry["needs"]
        self.check_serves(threat)
        if OFFERS.index(target.offers) < OFFERS.index(needs):
            raise ThreatError(f"expected a target with {needs} for {name}, got one with {target.offers}")
        if self._name in IMAGES and x.dim() != 4:
            raise InputError(f"images (N, C, H, W) for {name}", tuple(x.shape), "use another attack")

    def _attack(self, target: Target, x: Tensor, labels: Tensor, threat: ThreatModel, rng: Rng) -> Perturbed:
        unit = self._name in UNIT_BOX
        clean = (to_unit(x, threat.bounds) if unit else x.detach()).float()
        estimator = self._estimator(target, x)
        one_hot = nn.functional.one_hot(labels, estimator.nb_classes).float()
        arguments: dict[str, Any] = {"y": one_hot.cpu().numpy()}
        if self._name in STARTED:
            start = self._start(target, x, labels, threat, rng)
            if start is None:
                return Perturbed(x.clone())
            arguments["x_adv_init"] = start.float().cpu().numpy()
        strategy = _seeded_cma() if self._name in EVOLUTION else nullcontext()
        with seeded_globals(rng.batch_seed()), strategy:
            attack = self._make(estimator, len(x), threat)
            found = torch.from_numpy(attack.generate(clean.cpu().numpy(), **arguments)).to(clean)
        if threat.norm == "l0":  # which counts every change, also that by ART's maps to scales of its own and back
            found = torch.where((found - clean).abs() <= ROUNDING, clean, found)
        if unit or x.dtype != clean.dtype:
            # the change is mapped and not the image: a value that was left alone stays the same to the bit
            scale = threat.bounds[1] - threat.bounds[0] if unit else 1.0
            found = x + ((found - clean) * scale).to(x.dtype)
        return Perturbed(without_rounding(found, threat.bounds))

    def _estimator(self, target: Target, x: Tensor, channels_first: bool = True) -> PyTorchClassifier:
        unit = self._name in UNIT_BOX
        return PyTorchClassifier(
            model=_Shell(target, unit, self._name in PROBABILITIES),
            loss=nn.CrossEntropyLoss(reduction="sum"),
            input_shape=tuple(x.shape[1:]),
            nb_classes=target.count_classes(x),
            channels_first=channels_first,
            clip_values=(0.0, 1.0) if unit else target.bounds,
            preprocessing=None,
            device_type="cpu" if x.device.type == "cpu" else "gpu",
        )

    def _make(self, estimator: PyTorchClassifier, count: int, threat: ThreatModel) -> Any:
        decided: dict[str, Any] = {"norm": NORMS.get(threat.norm), "targeted": threat.targeted, "verbose": False}
        if self._name not in ONE_BY_ONE:
            decided["batch_size"] = count
        if self.entry["budget"] == "fixed":
            decided["eps"] = unit_eps(radius(threat), threat.bounds) if self._name in UNIT_BOX else radius(threat)
        known = inspect.signature(self.foreign.__init__).parameters
        settings = {**{key: value for key, value in decided.items() if key in known}, **self.params()}
        if self._name == "UniversalPerturbation" and settings["attacker"] != "fgsm":  # which shows no progress
            settings["attacker_params"] = {"verbose": False, **(settings["attacker_params"] or {})}
        attack = self.foreign(estimator, **settings)
        for inner in getattr(attack, "attacks", ()):
            inner.verbose = False
        return attack

    def _start(self, target: Target, x: Tensor, labels: Tensor, threat: ThreatModel, rng: Rng) -> Tensor | None:
        """Returns the first of ``init_size`` uniformly random images that is adversarial for the one sample."""
        wanted = labels if threat.targeted else target.predict(x)
        for _ in range(self.params()["init_size"]):
            start = rng.uniform(x.shape[1:], *threat.bounds, like=x)
            if bool((target.predict(start) == wanted) == threat.targeted):
                return start
        return None


class _Shell(nn.Module):
    """The network as ART sees it."""

    def __init__(self, target: Target, unit: bool, probabilities: bool) -> None:
        super().__init__()
        self.module = target.module
        self._dtype = target.dtype
        self._low, high = target.bounds if unit else (0.0, 1.0)
        self._scale = high - self._low
        self._probabilities = probabilities

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self._dtype)
        if (self._low, self._scale) != (0.0, 1.0):
            x = x * self._scale + self._low
        logits = self.module(x).float()
        return logits.softmax(1) if self._probabilities else logits  # type: ignore[no-any-return]


def _on_device(x: Tensor) -> Any:
    """Makes the device of x the current one, to which ART moves the network."""
    if x.device.type == "cpu":
        return nullcontext()
    if x.device.type != "cuda":
        raise InputError("samples on the CPU or a CUDA device, the only ones ART knows", x.device, "move the model")
    return torch.cuda.device(x.device)


@contextmanager
def _seeded_cma() -> Iterator[None]:
    """Lets CMA-ES go on with numpy's random numbers, which it would else seed by the clock."""
    import cma

    options = cma.CMAOptions.defaults()
    seed, options["seed"] = options["seed"], np.nan
    try:
        yield
    finally:
        options["seed"] = seed


@functools.cache
def __getattr__(name: str) -> type[Any]:
    if name == "SpatialTransformation":
        from robplug.adapters.art.spatial import Spatial  # which is derived from the class above

        return make_attack_class("art", name, Spatial)
    return make_attack_class("art", name, ArtAttack)

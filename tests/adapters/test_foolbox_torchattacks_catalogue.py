"""The catalogues of Foolbox and torchattacks: up to date, true of what they claim, and every entry runs."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from robplug.adapters.common import attack_specs, catalogue
from robplug.adapters.motion import MOTION
from robplug.norms import L0, L1, L2, LINF
from robplug.registry import resolve
from robplug.rng import Rng
from robplug.targets import Target, from_module
from robplug.types import AttackSpec, Perturbed, ThreatModel

LIBRARIES = ("foolbox", "torchattacks")
SPECS = [spec for library in LIBRARIES for spec in attack_specs(library)]
NORMS = {norm.name: norm for norm in (LINF, L2, L1, L0, MOTION)}
BOUNDS = (-1.0, 3.0)
SAMPLES = 4
CLASSES = 5

TINY = {
    "foolbox/l2-carlini-wagner": {"steps": 20, "binary_search_steps": 3, "initial_const": 1.0},
    "foolbox/ead": {"steps": 20, "binary_search_steps": 3, "initial_const": 1.0},
    "foolbox/boundary": {"steps": 30},
    "foolbox/hop-skip-jump": {"steps": 2, "initial_gradient_eval_steps": 5},
    "foolbox/gen": {"steps": 5, "population": 4},
    "foolbox/linear-search-contrast-reduction": {"steps": 20},
    "foolbox/linear-search-blended-uniform-noise": {"steps": 20, "directions": 5},
    "foolbox/gaussian-blur": {"steps": 10},
    "foolbox/salt-and-pepper-noise": {"steps": 50},
    "foolbox/newton-fool": {"steps": 10},
    "torchattacks/auto": {"version": "rand"},
    "torchattacks/square": {"n_queries": 20},
    "torchattacks/eaden": {"binary_search_steps": 2, "max_iterations": 10, "initial_const": 1.0},
    "torchattacks/eadl1": {"binary_search_steps": 2, "max_iterations": 10, "initial_const": 1.0},
    "torchattacks/spsa": {"nb_sample": 8},
    "torchattacks/pixle": {"restarts": 2, "max_iterations": 2},
}
"""Settings that make an entry quick; all others run as they are."""
LEAVE_THE_BOX = {"torchattacks/eaden", "torchattacks/eadl1"}
"""The library's first gradient step is written over its copy of the clean image, to which it returns later."""


class Watched(nn.Module):
    """A small network that notes whether it was asked for gradients, and can answer with labels only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Linear(64, CLASSES)
        self.gradients = False
        self.labels_only = False

    def forward(self, x: Tensor) -> Tensor:
        self.gradients |= x.requires_grad
        features = nn.functional.adaptive_avg_pool2d(nn.functional.gelu(self.norm(self.conv(x))), 4)
        logits: Tensor = self.last(features.flatten(1))
        if self.labels_only:
            logits = nn.functional.one_hot(logits.argmax(1), CLASSES).to(logits.dtype)
        return logits


@pytest.fixture(scope="module")
def problem() -> tuple[Target, Watched, Tensor, Tensor]:
    """A target, its network, samples and their predicted classes, which are of several kinds."""
    torch.manual_seed(3)
    network = Watched()
    x = torch.rand(SAMPLES, 3, 8, 8) * 4 - 1
    with torch.no_grad():
        network.eval()
        network.last.bias -= network(torch.rand(64, 3, 8, 8) * 4 - 1).mean(0)
    network.train()
    target = from_module(network, bounds=BOUNDS, classes=CLASSES)
    network.eval()
    y = target.predict(x)
    network.train()
    assert len(y.unique()) > 1
    return target, network, x, y


def runs() -> Iterator[object]:
    for spec in SPECS:
        for norm in spec.norms:
            if spec.untargeted:
                yield pytest.param(spec, norm, False, id=f"{spec.name}-{norm}")
            if spec.targeted:
                yield pytest.param(spec, norm, True, id=f"{spec.name}-{norm}-targeted")


def attack(spec: AttackSpec, norm: str, targeted: bool, problem: tuple[Target, Watched, Tensor, Tensor], seed: int = 0):
    target, _, x, y = problem
    eps = {"linf": 0.4, "l2": 2.0, "l1": 8.0, "rotation-translation": 2.0}[norm] if spec.budget == "fixed" else None
    threat = ThreatModel(norm, eps, BOUNDS, targeted)
    goal = (y + 1) % CLASSES if targeted else None
    made = resolve(spec)(**{**spec.params, **TINY.get(spec.name, {})})
    result: Perturbed = made.run(target, x, y, threat, Rng(seed, range(len(x))), y_goal=goal)
    return result, threat


@pytest.mark.filterwarnings("ignore:LinearSearchBlendedUniformNoiseAttack failed")
@pytest.mark.parametrize(("spec", "norm", "targeted"), list(runs()))
def test_every_offered_entry_runs(
    spec: AttackSpec, norm: str, targeted: bool, problem: tuple[Target, Watched, Tensor, Tensor]
) -> None:
    target, network, x, y = problem
    before, state = x.clone(), {key: value.clone() for key, value in network.state_dict().items()}
    network.gradients = False
    found, threat = attack(spec, norm, targeted, problem)

    assert found.x_adv.shape == x.shape and found.x_adv.dtype == x.dtype
    if spec.name not in LEAVE_THE_BOX:
        assert found.x_adv.min() >= BOUNDS[0] and found.x_adv.max() <= BOUNDS[1]
    if threat.eps is not None:
        distance = NORMS[norm].distance(x, found.x_adv, found.witness)
        assert (distance <= NORMS[norm].allowed(threat.eps, x[0].numel(), BOUNDS)).all()

    assert network.gradients == (spec.needs == "gradients")
    assert torch.equal(x, before)
    assert network.training and network.norm.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())

    if found.claim is not None:
        network.eval()
        goal = (y + 1) % CLASSES if targeted else y
        assert torch.equal(found.claim, (target.predict(found.x_adv) == goal) == targeted)
        network.train()


@pytest.mark.parametrize("spec", [spec for spec in SPECS if not spec.stochastic], ids=lambda spec: spec.name)
def test_entry_without_random_draws_ignores_the_seed(
    spec: AttackSpec, problem: tuple[Target, Watched, Tensor, Tensor]
) -> None:
    one, _ = attack(spec, spec.norms[0], not spec.untargeted, problem, seed=1)
    two, _ = attack(spec, spec.norms[0], not spec.untargeted, problem, seed=2)
    assert torch.equal(one.x_adv, two.x_adv)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.needs == "labels"], ids=lambda spec: spec.name)
@pytest.mark.filterwarnings("ignore:LinearSearchBlendedUniformNoiseAttack failed")
def test_entry_that_needs_labels_sees_only_labels(
    spec: AttackSpec, problem: tuple[Target, Watched, Tensor, Tensor]
) -> None:
    network = problem[1]
    from_scores, _ = attack(spec, spec.norms[0], False, problem)
    network.labels_only = True
    from_labels, _ = attack(spec, spec.norms[0], False, problem)
    network.labels_only = False
    assert torch.equal(from_scores.x_adv, from_labels.x_adv)


@pytest.mark.parametrize("library", LIBRARIES)
def test_committed_catalogue_is_what_the_survey_gives(library: str) -> None:
    survey = importlib.import_module(f"robplug.adapters.{library}.survey").survey()
    assert json.loads(json.dumps(survey)) == catalogue(library)


@pytest.mark.parametrize(("library", "classes"), [("foolbox", 58), ("torchattacks", 39)])
def test_every_class_is_offered_or_refused_once(library: str, classes: int) -> None:
    entries = [*catalogue(library)["offered"], *catalogue(library)["refused"]]
    assert len({entry["name"] for entry in entries}) == len({entry["object"] for entry in entries}) == classes
    assert all(entry["reason"] for entry in catalogue(library)["refused"])


@pytest.mark.parametrize("library", LIBRARIES)
def test_one_class_per_canonical_name_and_norm(library: str) -> None:
    pairs = [(spec.canonical, norm) for spec in attack_specs(library) if spec.canonical for norm in spec.norms]
    assert len(pairs) == len(set(pairs))

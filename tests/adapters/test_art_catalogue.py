"""ART's catalogue: up to date, true of what it claims, and every entry runs."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from robplug.adapters.art.survey import survey
from robplug.adapters.common import attack_specs, catalogue
from robplug.adapters.motion import MOTION
from robplug.norms import L0, L1, L2, LINF
from robplug.registry import resolve
from robplug.rng import Rng
from robplug.targets import Target, from_module
from robplug.types import AttackSpec, Perturbed, ThreatModel

SPECS = attack_specs("art")
NORMS = {norm.name: norm for norm in (LINF, L2, L1, L0, MOTION)}
BOUNDS = (-1.0, 3.0)
SAMPLES = 2
CLASSES = 5

STEPS = {"max_iter": 10, "eps_step": 0.2}
AUTO = {**STEPS, "nb_random_init": 1}
CARLINI = {"max_iter": 2, "binary_search_steps": 3, "initial_const": 10.0}
TINY = {
    "art/projected-gradient-descent": STEPS,
    "art/projected-gradient-descent-numpy": STEPS,
    "art/projected-gradient-descent-pytorch": STEPS,
    "art/basic-iterative-method": STEPS,
    "art/momentum-iterative-method": STEPS,
    "art/auto-projected-gradient-descent": AUTO,
    "art/auto-conjugate-gradient": AUTO,
    "art/rescaling-auto-conjugate-gradient": AUTO,
    "art/boundary": {"max_iter": 3, "num_trial": 5, "sample_size": 10},
    "art/carlini-l0-method": CARLINI,
    "art/carlini-l2-method": CARLINI,
    "art/carlini-l-inf-method": {"max_iter": 3, "learning_rate": 0.1, "decrease_factor": 0.3, "initial_const": 0.3},
    "art/elastic-net": {"max_iter": 10, "binary_search_steps": 2, "initial_const": 1.0},
    "art/hop-skip-jump": {"max_iter": 2, "init_eval": 5},
    "art/newton-fool": {"max_iter": 10},
    "art/pixel": {"th": 20, "max_iter": 1},
    "art/threshold": {"th": 120, "max_iter": 1},
    "art/sign-opt": {"num_trial": 20, "k": 5, "max_iter": 1},
    "art/sim-ba": {"max_iter": 40, "epsilon": 1.0},
    "art/spatial-transformation": {"num_translations": 3, "num_rotations": 3},
    "art/square": {"max_iter": 10},
    "art/universal-perturbation": {"max_iter": 2},
    "art/targeted-universal-perturbation": {"max_iter": 2, "attacker_params": {"targeted": True}},
    "art/virtual-adversarial-method": {"max_iter": 1},
    "art/zoo": {"use_resize": False, "use_importance": False, "nb_parallel": 8, "initial_const": 10.0},
    "art/saliency-map-method": {"theta": 2.0},
}
"""Settings that make an entry quick; all others run as they are."""


class Watched(nn.Module):
    """A small network that notes whether it was asked for gradients, and can answer with labels only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Linear(64, CLASSES)
        self.gradients = False
        self.labels_only = False

    def forward(self, x: Tensor) -> Tensor:
        self.gradients |= x.requires_grad
        features = nn.functional.adaptive_avg_pool2d(nn.functional.gelu(self.norm(self.conv(x))), 4)
        logits: Tensor = 5 * self.last(features.flatten(1))
        if self.labels_only:
            logits = nn.functional.one_hot(logits.argmax(1), CLASSES).to(logits.dtype)
        return logits


@pytest.fixture(scope="module")
def problem() -> tuple[Target, Watched, Tensor, Tensor]:
    """A target, its network in training mode, samples and their predicted classes, which are of several kinds."""
    torch.manual_seed(5)
    network = Watched().eval()
    x = torch.rand(SAMPLES, 1, 8, 8) * 4 - 1
    target = from_module(network, bounds=BOUNDS, classes=CLASSES)
    with torch.no_grad():
        network.last.bias -= network(torch.rand(64, 1, 8, 8) * 4 - 1).mean(0) / 5
    y = target.predict(x)
    assert len(y.unique()) > 1
    network.train()
    return target, network, x, y


def runs() -> Iterator[object]:
    for spec in SPECS:
        for norm in spec.norms:
            if spec.untargeted:
                yield pytest.param(spec, norm, False, id=f"{spec.name}-{norm}")
            if spec.targeted:
                yield pytest.param(spec, norm, True, id=f"{spec.name}-{norm}-targeted")


def attack(
    spec: AttackSpec, norm: str, targeted: bool, problem: tuple[Target, Watched, Tensor, Tensor], seed: int = 0
) -> tuple[Perturbed, ThreatModel]:
    target, _, x, y = problem
    eps = {"linf": 0.8, "l2": 8.0, "l1": 40.0, "rotation-translation": 2.0}[norm] if spec.budget == "fixed" else None
    threat = ThreatModel(norm, eps, BOUNDS, targeted)
    goal = (y + 1) % CLASSES if targeted else None
    made = resolve(spec)(**{**spec.params, **TINY.get(spec.name, {})})
    return made.run(target, x, y, threat, Rng(seed, range(len(x))), y_goal=goal), threat


@pytest.mark.filterwarnings("ignore:function_values is not a list of scalars")  # from CMA-ES, as ART calls it
@pytest.mark.parametrize(("spec", "norm", "targeted"), list(runs()))
def test_every_offered_entry_runs(
    spec: AttackSpec,
    norm: str,
    targeted: bool,
    problem: tuple[Target, Watched, Tensor, Tensor],
    capfd: pytest.CaptureFixture[str],
) -> None:
    _, network, x, _ = problem
    before, state = x.clone(), {key: value.clone() for key, value in network.state_dict().items()}
    network.gradients = False
    found, threat = attack(spec, norm, targeted, problem)

    assert found.x_adv.shape == x.shape and found.x_adv.dtype == x.dtype and found.claim is None
    assert found.x_adv.isfinite().all() and not torch.equal(found.x_adv, x)
    assert found.x_adv.min() >= BOUNDS[0] and found.x_adv.max() <= BOUNDS[1]
    if threat.eps is not None:
        distance = NORMS[norm].distance(x, found.x_adv, found.witness)
        assert (distance <= NORMS[norm].allowed(threat.eps, x[0].numel(), BOUNDS)).all()

    assert network.gradients == (spec.needs == "gradients")
    assert torch.equal(x, before)
    assert network.training and network.norm.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert capfd.readouterr() == ("", ""), "ART shows its progress"


@pytest.mark.filterwarnings("ignore:function_values is not a list of scalars")
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_random_draws_come_from_the_seed_alone(
    spec: AttackSpec, problem: tuple[Target, Watched, Tensor, Tensor]
) -> None:
    one, again, other = (attack(spec, spec.norms[0], not spec.untargeted, problem, seed)[0].x_adv for seed in (1, 1, 2))
    assert torch.equal(one, again)
    if not spec.stochastic:
        assert torch.equal(one, other)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.needs == "labels"], ids=lambda spec: spec.name)
def test_entry_that_needs_labels_sees_only_labels(
    spec: AttackSpec, problem: tuple[Target, Watched, Tensor, Tensor]
) -> None:
    network = problem[1]
    from_scores, _ = attack(spec, spec.norms[0], False, problem)
    network.labels_only = True
    from_labels, _ = attack(spec, spec.norms[0], False, problem)
    network.labels_only = False
    assert torch.equal(from_scores.x_adv, from_labels.x_adv)


def test_committed_catalogue_is_what_the_survey_gives() -> None:
    assert json.loads(json.dumps(survey())) == catalogue("art")


def test_every_class_is_offered_or_refused_once() -> None:
    entries = [*catalogue("art")["offered"], *catalogue("art")["refused"]]
    assert len({entry["name"] for entry in entries}) == len({entry["object"] for entry in entries}) == 62
    assert all(entry["reason"] for entry in catalogue("art")["refused"])


def test_one_class_per_canonical_name_and_norm() -> None:
    pairs = [(spec.canonical, norm) for spec in SPECS if spec.canonical for norm in spec.norms]
    assert len(pairs) == len(set(pairs))

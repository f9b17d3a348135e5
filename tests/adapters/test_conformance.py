"""PGD of the four sources, harmonised: the same start, steps and step size must give the same x_adv.

``pytest tests/adapters -k conformance -s`` prints the whole table, which docs/conformance.md repeats. The networks are
smooth: at the kink of a ReLU the gradient jumps, so that a rounding in the last place parts two correct attacks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from robplug.plugins import registry
from robplug.rng import Rng
from robplug.targets import Target, from_module
from robplug.types import ThreatModel

LIBRARIES = ("art", "foolbox", "torchattacks")
EPS = {"linf": 0.03, "l2": 0.25}
SAMPLES = 32
TOLERANCE = 1e-6


def _networks() -> dict[str, nn.Module]:
    torch.manual_seed(7)
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.GELU(), nn.Linear(64, 10))
    cnn = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.GELU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(128, 10),
    )
    networks = {"mlp": mlp.eval(), "cnn": cnn.eval()}
    for network in networks.values():
        # without this an untrained network has one favourite class, and hardly a verdict changes
        with torch.no_grad():
            network[-1].bias -= network(torch.rand(256, 3, 8, 8)).mean(0)
    return networks


@functools.cache
def _problem(network: str, box: str) -> tuple[Target, Tensor, Tensor]:
    """Returns target, images and labels: an active box has many values at 0 and 1, an inactive one none near."""
    target = from_module(_networks()[network], classes=10)
    torch.manual_seed(8)
    x = torch.rand(SAMPLES, 3, 8, 8)
    x = (1.4 * x - 0.2).clamp(0, 1) if box == "active" else 0.49 + 0.02 * x
    return target, x, target.predict(x)


@functools.cache
def _attack(source: str, network: str, norm: str, box: str) -> tuple[Tensor, Tensor]:
    """Returns x_adv and the predictions for it."""
    target, x, y = _problem(network, box)
    threat = ThreatModel(norm, EPS[norm])
    params = {"steps": 10, "step_size": EPS[norm] / 4, "random_start": False}
    spec, own = registry().harmonised("pgd", source, params, threat)
    if source == "robplug":
        own["early_stop"] = False
    x_adv = registry().attack(spec.name, **own).run(target, x, y, threat, Rng(0, range(len(x)))).x_adv
    return x_adv, target.predict(x_adv)


def _clipped_before_scaled(network: str) -> Tensor:
    """Returns x_adv of l2 PGD written out with the box before the ball."""
    target, x, y = _problem(network, "active")
    z, eps = x, EPS["l2"]
    for _ in range(10):
        z = z.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(target.logits(z), y, reduction="sum"), z)
        z = (z.detach() + eps / 4 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).clamp(0, 1)
        z = x + (z - x) * (eps / (z - x).flatten(1).norm(dim=1)).clamp(max=1).view(-1, 1, 1, 1)
    return z


@pytest.fixture(scope="module")
def table() -> Iterator[list[tuple[str, str, str, str, float, int]]]:
    """Collects rows (source, network, norm, box, difference, verdicts that differ) and prints them at the end."""
    rows: list[tuple[str, str, str, str, float, int]] = []
    yield rows
    print("\n\nPGD, 10 steps of eps / 4, no random start: largest |x_adv - x_adv of robplug|")
    print(f"{'source':14}{'network':9}{'norm':6}{'box':10}{'difference':>12}  verdicts that differ")
    for source, network, norm, box, difference, verdicts in rows:
        print(f"{source:14}{network:9}{norm:6}{box:10}{difference:12.1e}  {verdicts} of {SAMPLES}")


@pytest.mark.parametrize("box", ["active", "inactive"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("network", ["mlp", "cnn"])
@pytest.mark.parametrize("source", LIBRARIES)
def test_pgd_conformance(
    source: str, network: str, norm: str, box: str, table: list[tuple[str, str, str, str, float, int]]
) -> None:
    ours, our_predictions = _attack("robplug", network, norm, box)
    theirs, their_predictions = _attack(source, network, norm, box)
    difference = float((ours - theirs).abs().max())
    verdicts = int((our_predictions != their_predictions).sum())
    table.append((source, network, norm, box, difference, verdicts))
    if (source, norm, box) == ("art", "l2", "active"):
        # ART clips to the box and then scales onto the ball; the others scale and then clip
        assert difference > 1e-3
        assert (theirs - _clipped_before_scaled(network)).abs().max() <= TOLERANCE
        return
    assert difference <= TOLERANCE
    assert verdicts == 0


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_conformance_attack_does_something(network: str, norm: str) -> None:
    """Sources that all did nothing would agree, too."""
    _, x, y = _problem(network, "active")
    x_adv, predictions = _attack("robplug", network, norm, "active")
    p = {"linf": torch.inf, "l2": 2}[norm]
    assert (x_adv - x).flatten(1).norm(p, dim=1).min() > 0.9 * EPS[norm]
    assert 0.2 < (predictions != y).float().mean() < 1.0
    assert ((x_adv == 0) | (x_adv == 1)).any(), "the box is meant to be active here"
    inactive, _ = _attack("robplug", network, norm, "inactive")
    assert inactive.min() > 0 and inactive.max() < 1


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-2.0, 3.0)])
def test_cw_conformance_with_foolbox(bounds: tuple[float, float]) -> None:
    """The same loss, optimiser and constants: the distances are the same but for rounding on the way."""
    low, high = bounds
    _, x, _ = _problem("mlp", "inactive")
    x = (low + (high - low) * x)[:8]
    target = from_module(_networks()["mlp"], bounds=bounds, classes=10)
    y, threat = target.predict(x), ThreatModel("l2", bounds=bounds)
    distances = []
    for source in ("robplug", "foolbox"):
        spec, own = registry().harmonised("cw", source, {"steps": 40, "initial_const": 1.0}, threat)
        x_adv = registry().attack(spec.name, **own).run(target, x, y, threat, Rng(0, range(8))).x_adv
        assert (target.predict(x_adv) != y).all()
        distances.append((x_adv - x).flatten(1).norm(dim=1))
    torch.testing.assert_close(*distances, rtol=0.01, atol=1e-4)

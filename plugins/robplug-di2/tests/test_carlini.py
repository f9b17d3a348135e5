"""D-C&W: the smallest distance on a linear model, another library's, and what diversity and confidence change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import robplug
from robplug.errors import InputError, ThreatError
from robplug.loop import margin
from robplug.rng import Rng
from robplug.types import ThreatModel
from robplug_di2.carlini import DiverseCarliniWagner

L2 = ThreatModel("l2")


def attacked(attack: DiverseCarliniWagner, model: nn.Module, x: Tensor, y: Tensor, seed: int = 0) -> Tensor:
    return attack.run(robplug.target(model), x, y, L2, Rng(seed, range(len(x)))).x_adv


def linear() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Returns a linear model, samples away from the bounds and their distances to the other class."""
    torch.manual_seed(0)
    layer = nn.Linear(48, 2)
    x = 0.4 + 0.2 * torch.rand(8, 3, 4, 4)
    model = nn.Sequential(nn.Flatten(), layer)
    lead = margin(model(x), model(x).argmax(1)).detach()
    return model, x, model(x).argmax(1), -lead / (layer.weight[0] - layer.weight[1]).norm().detach()


def distance(x: Tensor, x_adv: Tensor) -> Tensor:
    return (x_adv - x).flatten(1).norm(dim=1)


def test_the_smallest_distance_on_a_linear_model() -> None:
    model, x, y, least = linear()
    attack = DiverseCarliniWagner(p=0.0, steps=150, binary_search_steps=8, initial_const=1.0)
    x_adv = attacked(attack, model, x, y)
    assert (model(x_adv).argmax(1) != y).all()
    found = distance(x, x_adv)
    assert (found >= least * (1 - 1e-4)).all() and (found <= least * 1.05 + 1e-3).all()


def test_confidence_is_reached_on_the_image_itself() -> None:
    model, x, y, least = linear()
    attack = DiverseCarliniWagner(p=0.0, steps=100, confidence=0.5, binary_search_steps=5, initial_const=1.0)
    x_adv = attacked(attack, model, x, y)
    assert (margin(model(x_adv), y) >= 0.5).all()
    assert (distance(x, x_adv) > least).all()


class AnySize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(3, 8, 3)
        self.readout = nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return 20 * self.readout(torch.tanh(4 * self.conv(x - 0.5)).mean((2, 3)))  # type: ignore[no-any-return]


def scene() -> tuple[nn.Module, Tensor, Tensor]:
    model = AnySize().eval()
    torch.manual_seed(2)
    x = 0.35 + 0.2 * torch.rand(6, 3, 1, 1) + 0.1 * torch.rand(6, 3, 20, 20)
    return model, x, model(x).argmax(1)


def test_without_diversity_it_is_as_near_as_foolboxs() -> None:
    """The same loss, optimiser and search, so that the distances are the same but for rounding on the way."""
    foolbox = pytest.importorskip("foolbox")
    model, x, y = scene()
    fmodel = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    options = {"steps": 40, "binary_search_steps": 4, "initial_const": 0.01, "confidence": 0.0}
    theirs = foolbox.attacks.L2CarliniWagnerAttack(abort_early=False, stepsize=0.01, **options).run(fmodel, x, y)
    ours = attacked(DiverseCarliniWagner(p=0.0, **options), model, x, y)  # type: ignore[arg-type]
    assert (model(ours).argmax(1) != y).all() and (model(theirs).argmax(1) != y).all()
    torch.testing.assert_close(distance(x, ours), distance(x, theirs), rtol=0.01, atol=1e-4)


def test_diverse_inputs_break_the_image_itself() -> None:
    model, x, y = scene()
    options = {"steps": 60, "binary_search_steps": 3, "initial_const": 1.0}
    plain = attacked(DiverseCarliniWagner(p=0.0, **options), model, x, y)  # type: ignore[arg-type]
    attack = DiverseCarliniWagner(**options)  # type: ignore[arg-type]
    once, again, other = (attacked(attack, model, x, y, seed) for seed in (0, 0, 1))
    assert torch.equal(once, again) and not torch.equal(once, other) and not torch.equal(once, plain)
    assert (model(once).argmax(1) != y).all()
    assert (distance(x, once) < 2 * distance(x, plain)).all()


def test_goals_are_reached_and_the_claim_says_what_was_seen() -> None:
    model, x, y = scene()
    goal = (y + 1) % 5
    threat = ThreatModel("l2", targeted=True)
    found = DiverseCarliniWagner(steps=60).run(robplug.target(model), x, None, threat, Rng(0, range(6)), y_goal=goal)
    assert found.claim is not None and torch.equal(found.claim, model(found.x_adv).argmax(1) == goal)
    assert found.claim.any()
    short = DiverseCarliniWagner(steps=1, binary_search_steps=1)
    assert not short.run(robplug.target(model), x, y, L2, Rng(0, range(6))).claim.any()  # type: ignore[union-attr]


def test_bad_input_is_named() -> None:
    for options, words in (
        ({"steps": 0}, "steps >= 1, got 0"),
        ({"binary_search_steps": 0}, "binary_search_steps >= 1, got 0"),
        ({"step_size": 0.0}, "step_size > 0, got 0.0"),
        ({"initial_const": float("inf")}, "initial_const > 0, got inf"),
        ({"confidence": -1.0}, "confidence >= 0, got -1.0"),
        ({"p": 1.1}, "probability p"),
    ):
        with pytest.raises(InputError, match=words):
            DiverseCarliniWagner(**options)  # type: ignore[arg-type]
    model, x, y = scene()
    for threat in (ThreatModel("linf"), ThreatModel("l2", 0.5)):
        with pytest.raises(ThreatError, match=r"expected a threat with norm l2 and eps=None, got .*di2/m-di2-fgsm"):
            DiverseCarliniWagner().run(robplug.target(model), x, y, threat, Rng(0, range(6)))
    flat = nn.Sequential(nn.Flatten(), nn.Linear(1200, 5))
    with pytest.raises(InputError, match="takes images of 22x22, got one for 20x20"):
        attacked(DiverseCarliniWagner(p=1.0), flat, x, y)

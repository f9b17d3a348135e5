"""C&W: the smallest distance on a linear model, Foolbox's on networks, and what ends, starts and draws change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import robplug
from robplug.carlini import CarliniWagner
from robplug.errors import InputError, ThreatError
from robplug.loop import margin
from robplug.plugins import registry
from robplug.rng import Rng
from robplug.targets import Target
from robplug.types import Perturbed, ThreatModel

L2, TOWARDS = ThreatModel("l2"), ThreatModel("l2", targeted=True)


def attacked(attack: CarliniWagner, model: nn.Module | Target, x: Tensor, labels: Tensor, towards: bool) -> Perturbed:
    target = model if isinstance(model, Target) else robplug.target(model)
    y, y_goal = (None, labels) if towards else (labels, None)
    return attack.run(target, x, y, TOWARDS if towards else L2, Rng(0, range(len(x))), y_goal=y_goal)


def distance(x: Tensor, x_adv: Tensor) -> Tensor:
    return (x_adv - x).flatten(1).norm(dim=1)


def linear() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Returns a linear model of two classes, samples away from the bounds, predictions and distances to the plane."""
    torch.manual_seed(0)
    layer = nn.Linear(48, 2)
    model = nn.Sequential(nn.Flatten(), layer)
    x = 0.4 + 0.2 * torch.rand(8, 3, 4, 4)
    with torch.no_grad():
        y = model(x).argmax(1)
        return model, x, y, -margin(model(x), y) / (layer.weight[0] - layer.weight[1]).norm()


@pytest.mark.parametrize("towards", [False, True])
def test_the_smallest_distance_on_a_linear_model(towards: bool) -> None:
    model, x, y, least = linear()
    attack = CarliniWagner(steps=100, binary_search_steps=6, initial_const=1.0)
    result = attacked(attack, model, x, 1 - y if towards else y, towards)
    assert result.claim is not None and result.claim.all() and (model(result.x_adv).argmax(1) != y).all()
    found = distance(x, result.x_adv)
    assert (found >= least * (1 - 1e-4)).all() and (found <= least * 1.05 + 1e-3).all()


def digits() -> tuple[nn.Module, Tensor]:
    return robplug.target("robplug/digits-standard").module, robplug.dataset("digits", split="test").head(24).x


def small_cnn() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU())
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 5)).eval()
    x = torch.rand(24, 3, 8, 8)
    with torch.no_grad():  # without this an untrained network has one favourite class
        model[-1].bias -= model(x).mean(0)
    return model, x


@pytest.mark.parametrize("towards", [False, True])
@pytest.mark.parametrize("scene", [digits, small_cnn])
def test_as_near_as_foolboxs(scene, towards: bool) -> None:  # type: ignore[no-untyped-def]
    foolbox = pytest.importorskip("foolbox")
    model, x = scene()
    y = model(x).argmax(1)
    labels = (y + 1) % model(x).shape[1] if towards else y
    options = {"steps": 60, "binary_search_steps": 4, "initial_const": 1.0, "confidence": 0.0, "abort_early": False}
    criterion = foolbox.TargetedMisclassification(labels) if towards else foolbox.Misclassification(labels)
    fmodel = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    theirs = foolbox.attacks.L2CarliniWagnerAttack(stepsize=0.05, **options).run(fmodel, x, criterion)
    ours = attacked(CarliniWagner(step_size=0.05, **options), model, x, labels, towards).x_adv  # type: ignore[arg-type]
    # where Foolbox's fails it returns a black image, which may be misclassified by chance
    their_success = ((model(theirs).argmax(1) == labels) == towards) & theirs.flatten(1).any(1)
    our_success = (model(ours).argmax(1) == labels) == towards
    assert our_success.sum() >= their_success.sum() > len(x) / 2
    medians = [distance(x, found)[won].median() for found, won in ((ours, our_success), (theirs, their_success))]
    torch.testing.assert_close(medians[0], medians[1], rtol=0.02, atol=0.0)


class Counting(nn.Module):
    """A model that counts the samples which it is shown."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.seen = model, 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return self.model(x)  # type: ignore[no-any-return]


def test_samples_that_stall_leave_and_the_distances_stay() -> None:
    model, x = digits()
    x, y = x[:8], model(x[:8]).argmax(1)
    runs = {}
    for early in (False, True):
        counting = Counting(model)
        attack = CarliniWagner(steps=1000, step_size=0.1, binary_search_steps=1, initial_const=10.0, abort_early=early)
        runs[early] = distance(x, attacked(attack, counting, x, y, False).x_adv), counting.seen
    (whole, all_seen), (early_one, seen) = runs[False], runs[True]
    assert all_seen == 8 * 1000 and seen < 0.9 * all_seen
    torch.testing.assert_close(early_one.median(), whole.median(), rtol=0.02, atol=0.0)


def test_neighbours_do_not_decide_when_a_sample_leaves() -> None:
    model, x = digits()
    x = x[:6].double()
    model = model.double()  # so that the order of a sum changes no comparison
    y = model(x).argmax(1)
    attack = CarliniWagner(steps=100, step_size=0.1, binary_search_steps=3, initial_const=10.0)
    together = attacked(attack, model, x, y, False).x_adv
    alone = torch.cat([attacked(attack, model, x[i : i + 1], y[i : i + 1], False).x_adv for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=0.0, atol=1e-8)


class Plateau(nn.Module):
    """Class 0 on and around a grey image, where the gradient is zero, and class 1 beyond; the edge is 0.84 away."""

    def forward(self, x: Tensor) -> Tensor:
        beyond = 1000 * ((x - 0.5).square().flatten(1).mean(1) - 0.01).relu()
        return torch.stack([torch.full_like(beyond, 5.0), beyond], 1)


def test_random_starts_get_off_a_plateau() -> None:
    x, y = torch.full((4, 3, 4, 4), 0.5), torch.zeros(4, dtype=torch.int64)
    options = {"steps": 100, "binary_search_steps": 4, "initial_const": 0.1}
    plain = attacked(CarliniWagner(**options), Plateau(), x, y, False)  # type: ignore[arg-type]
    assert plain.claim is not None and not plain.claim.any() and torch.equal(plain.x_adv, x)
    attack = CarliniWagner(restarts=2, start_radius=0.8, **options)  # type: ignore[arg-type]
    found = attacked(attack, Plateau(), x, y, False)
    assert found.claim is not None and found.claim.all()
    edge = (48 * 0.015) ** 0.5
    assert (distance(x, found.x_adv) < 1.02 * edge).all()


def test_a_start_has_its_length_and_stays_inside() -> None:
    seen: list[Tensor] = []

    class Watching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach())
            return x.flatten(1)[:, :2]

    x = torch.cat([torch.full((2, 1, 5, 5), 0.5), torch.zeros(2, 1, 5, 5)])
    attack = CarliniWagner(steps=1, binary_search_steps=1, restarts=3, start_radius=0.4)
    attacked(attack, Watching(), x, torch.zeros(4, dtype=torch.int64), False)
    first, *others = seen
    torch.testing.assert_close(first, x, rtol=0.0, atol=1e-5)
    for start in others:
        torch.testing.assert_close(distance(x, start)[:2], torch.full((2,), 0.4), rtol=1e-4, atol=0.0)
        assert start.min() >= 0 and (distance(x, start)[2:] < 0.4).all()
    assert not torch.equal(others[0], others[1]) and not torch.equal(others[0][0], others[0][1])


def test_a_constant_weighs_squared_distances_in_widths_of_the_bounds() -> None:
    """A network that is shown the data on another scale gets the same attack, and harmonised parameters say so."""
    model, x, y, _ = linear()
    wide = robplug.target(nn.Sequential(Shift(-2.0, 5.0), model), bounds=(-2.0, 3.0))
    attack = CarliniWagner(steps=60, binary_search_steps=4, initial_const=1.0)
    narrow_adv = attacked(attack, model, x, y, False).x_adv
    threat = ThreatModel("l2", bounds=(-2.0, 3.0))
    wide_adv = attack.run(wide, 5 * x - 2, y, threat, Rng(0, range(8))).x_adv
    torch.testing.assert_close((wide_adv + 2) / 5, narrow_adv, rtol=0.0, atol=1e-3)
    spec, own = registry().harmonised("cw", "robplug", {"initial_const": 50.0}, threat)
    assert (spec.name, own["initial_const"], own["abort_early"]) == ("robplug/cw", 2.0, False)


class Shift(nn.Module):
    def __init__(self, low: float, width: float) -> None:
        super().__init__()
        self.low, self.width = low, width

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.low) / self.width


def test_bad_input_is_named() -> None:
    for options, words in (
        ({"steps": 0}, "steps >= 1, got 0"),
        ({"binary_search_steps": 0}, "binary_search_steps >= 1, got 0"),
        ({"restarts": 0}, "restarts >= 1, got 0"),
        ({"draws": 0}, "draws >= 1, got 0"),
        ({"step_size": float("nan")}, "a finite step_size > 0, got nan"),
        ({"initial_const": 0.0}, "initial_const > 0, got 0.0"),
        ({"start_radius": -1.0}, "start_radius > 0, got -1.0"),
        ({"confidence": -1.0}, "confidence >= 0, got -1.0"),
        ({"transform": "flip"}, "a transform that is a function of images and streams, got 'flip'"),
    ):
        with pytest.raises(InputError, match=words):
            CarliniWagner(**options)  # type: ignore[arg-type]
    model, x, y, _ = linear()
    for threat in (ThreatModel("linf"), ThreatModel("l2", 0.5)):
        with pytest.raises(ThreatError, match=r"norm l2 and eps=None, got .*robplug/pgd keeps a radius"):
            CarliniWagner().run(robplug.target(model), x, y, threat, Rng(0, range(8)))
    with pytest.raises(ThreatError, match="a target with gradients, got one with scores"):
        attacked(CarliniWagner(), robplug.target(model, offers="scores"), x, y, False)
    with pytest.raises(ThreatError, match="a finite gradient of the target, got nan or inf"):
        attacked(
            CarliniWagner(),
            nn.Sequential(nn.Flatten(), Root(), nn.Linear(48, 2)),
            torch.zeros(1, 3, 4, 4),
            y[:1],
            False,
        )


class Root(nn.Module):
    """Its gradient is infinite at the middle of a black image's change."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.detach()).abs().sqrt()

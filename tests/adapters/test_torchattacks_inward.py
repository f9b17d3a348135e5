"""torchattacks' attacks on robplug targets: bounds, side effects, random numbers, refusals."""

from __future__ import annotations

import pytest
import torch
import torchattacks
from torch import Tensor, nn

from robplug.adapters.torchattacks import inward
from robplug.errors import InputError, ThreatError
from robplug.norms import LINF
from robplug.plugins import registry
from robplug.rng import Rng
from robplug.targets import evaluation_mode, from_module
from robplug.types import ThreatModel


class Affine(nn.Module):
    """A network behind x * scale + shift."""

    def __init__(self, network: nn.Module, scale: float, shift: float) -> None:
        super().__init__()
        self.network = network
        self.scale = scale
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x * self.scale + self.shift)


def network() -> nn.Module:
    torch.manual_seed(5)
    made = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 6)
    ).eval()
    with torch.no_grad():  # so that it has no favourite class
        made[5].bias -= made(torch.rand(64, 1, 8, 8)).mean(0)
    return made


def images(count: int = 6) -> Tensor:
    torch.manual_seed(6)
    return torch.rand(count, 1, 8, 8)


def run(name: str, module: nn.Module, x: Tensor, threat: ThreatModel, seed: int = 0, **params: object) -> Tensor:
    target = from_module(module, bounds=threat.bounds, classes=6)
    with evaluation_mode(module):
        y = target.predict(x.float()) if len(x) else torch.zeros(0, dtype=torch.int64)
    goal = {"y_goal": (y + 1) % 6} if threat.targeted else {}
    attack = registry().attack(name, **params)
    return attack.run(target, x, y, threat, Rng(seed, range(len(x))), **goal).x_adv


@pytest.mark.parametrize(
    ("name", "norm", "eps"),
    [
        ("pgd", "linf", 0.1),
        ("fgsm", "linf", 0.1),
        ("pgdl2", "l2", 0.5),
        ("apgd", "l2", 0.5),
        ("square", "linf", 0.1),
        ("cw", "l2", None),
        ("fab", "l2", 2.0),
        ("deep-fool", "l2", None),
        ("one-pixel", "l0", None),
        ("gn", "l2", None),
    ],
)
def test_other_bounds_give_the_mapped_result(name: str, norm: str, eps: float | None) -> None:
    """A network for [-1, 3] and the same one behind the map from [0, 1] are one problem in two units."""
    low, scale = -1.0, 4.0
    x = images()
    unit = run(f"torchattacks/{name}", Affine(network(), scale, low), x, ThreatModel(norm, eps))
    threat = ThreatModel(norm, eps and eps * scale, (low, low + scale))
    wide = run(f"torchattacks/{name}", network(), x * scale + low, threat)
    assert torch.allclose(wide, unit * scale + low, atol=2e-5)
    assert float((unit - x).abs().max()) > 1e-3


@pytest.mark.parametrize("bounds", [(-1.0, 1.0), (-2.1179, 2.64), (0.0, 255.0)])
@pytest.mark.parametrize("steps", [1 / 255, 8 / 255])
def test_map_to_other_bounds_oversteps_no_radius(bounds: tuple[float, float], steps: float) -> None:
    scale = bounds[1] - bounds[0]
    x = (images(64) * scale + bounds[0]).clamp(*bounds)
    x_adv = run("torchattacks/pgd", network(), x, ThreatModel("linf", steps * scale, bounds))
    allowed = LINF.allowed(steps * scale, 64, bounds)
    assert LINF.distance(x, x_adv).max() <= allowed
    assert LINF.distance(x, x_adv).max() > 0.99 * steps * scale
    assert x_adv.min() >= bounds[0] and x_adv.max() <= bounds[1]


def test_unchanged_values_are_unchanged_to_the_bit() -> None:
    x = images() * 4.7579 - 2.1179
    threat = ThreatModel("l0", None, (-2.1179, 2.64))
    x_adv = run("torchattacks/one-pixel", network(), x.clamp(*threat.bounds), threat)
    assert ((x_adv != x).flatten(1).sum(1) <= 1).all()


def test_what_leaves_the_box_is_not_brought_back() -> None:
    """EAD of torchattacks writes over its own clean image; hiding that would make a valid sample of it."""
    x = (images() * 8 - 3).clamp(-1.0, 3.0)
    threat = ThreatModel("l1", None, (-1.0, 3.0))
    own = {"initial_const": 100.0, "binary_search_steps": 3, "max_iterations": 10}
    assert run("torchattacks/eadl1", network(), x, threat, **own).max() > 3.01


def test_result_at_unit_bounds_is_the_librarys_own() -> None:
    module, x = network(), images()
    y = module(x).argmax(1)
    own = torchattacks.PGD(module, eps=0.1, alpha=0.03, steps=4, random_start=False)(x, y)
    ours = run("torchattacks/pgd", module, x, ThreatModel("linf", 0.1), alpha=0.03, steps=4, random_start=False)
    assert torch.equal(own, ours)


def test_goals_are_approached() -> None:
    module, x = network(), images()
    goal = (module(x).argmax(1) + 1) % 6
    x_adv = run("torchattacks/pgd", module, x, ThreatModel("linf", 0.2, targeted=True))
    before = module(x).log_softmax(1).gather(1, goal[:, None])
    after = module(x_adv).log_softmax(1).gather(1, goal[:, None])
    assert (after > before).all()


@pytest.mark.parametrize("name", ["pgd", "cw", "deep-fool", "fab", "jsma"])
def test_model_is_left_as_it_was(name: str) -> None:
    """torchattacks ends with train(), which unfreezes a frozen batch norm; some attacks write weight gradients."""
    module = network().train()
    module[1].eval()  # a frozen batch norm in a training network
    module[0].weight.requires_grad_(False)
    module[5].weight.grad = torch.full_like(module[5].weight, 7.0)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    spec = registry().spec("attack", f"torchattacks/{name}")
    eps = 0.1 if spec.budget == "fixed" else None
    run(spec.name, module, images(), ThreatModel(spec.norms[0], eps, targeted=not spec.untargeted))
    assert module.training and not module[1].training and module[3].training
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    assert not module[0].weight.requires_grad and module[5].weight.requires_grad
    assert module[0].weight.grad is None and module[5].bias.grad is None
    assert (module[5].weight.grad == 7.0).all()


def test_the_library_alone_unfreezes_batch_norm() -> None:
    """The symptom that the test above is about; when this fails, the library has been mended."""
    module = network().train()
    module[1].eval()
    torchattacks.PGD(module, eps=0.1)(images(), torch.arange(6))
    assert module[1].training


def test_global_random_numbers_go_on_as_if_nothing_had_happened() -> None:
    module, x = network(), images()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    run("torchattacks/apgd", module, x, ThreatModel("linf", 0.1))  # calls torch.manual_seed(0) by itself
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("name", "norm"), [("pgd", "linf"), ("apgd", "linf"), ("square", "linf"), ("auto", "l2")])
def test_draws_follow_the_rng(name: str, norm: str) -> None:
    own = {"version": "rand"} if name == "auto" else {}
    results = [
        run(f"torchattacks/{name}", network(), images(), ThreatModel(norm, 0.3), seed, **own) for seed in (0, 0, 1)
    ]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_network_without_parameters_and_flat_samples() -> None:
    """The library takes the device from a parameter, and the shape (N, C, H, W) for granted."""

    class Sums(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x[:, :5].sum(1), x[:, 5:].sum(1)], 1)

    x = torch.full((3, 10), 0.5)
    target, threat = from_module(Sums()), ThreatModel("l2", 0.1)
    y = torch.zeros(3, dtype=torch.int64)
    x_adv = registry().attack("torchattacks/pgdl2").run(target, x, y, threat, Rng(0, range(3))).x_adv
    step = 0.1 / 10**0.5  # the optimum of a linear model: eps along the gradient
    assert torch.allclose(x_adv, x + step * torch.tensor([-1.0] * 5 + [1.0] * 5), atol=1e-2 * step)


def test_empty_batch() -> None:
    assert run("torchattacks/pgd", network(), images()[:0], ThreatModel("linf", 0.1)).shape == (0, 1, 8, 8)


def test_double_samples_meet_the_models_dtype() -> None:
    x_adv = run("torchattacks/pgd", network(), images().double(), ThreatModel("linf", 0.1))
    assert x_adv.dtype == torch.float64


@pytest.mark.parametrize(
    ("name", "threat", "message"),
    [
        ("pgd", ThreatModel("l2", 0.1), "expected a norm that torchattacks/pgd serves (linf), got l2"),
        ("tpgd", ThreatModel("linf", 0.1, targeted=True), "torchattacks/tpgd serves, got targeted=True"),
        ("jsma", ThreatModel("l0"), "torchattacks/jsma serves, got targeted=False"),
        ("pgd", ThreatModel("linf"), "expected a threat with eps"),
    ],
)
def test_threats_that_an_attack_cannot_serve(name: str, threat: ThreatModel, message: str) -> None:
    with pytest.raises(ThreatError) as caught:
        run(f"torchattacks/{name}", network(), images(), threat)
    assert message in str(caught.value)


def test_attack_on_colours_names_what_it_needs() -> None:
    with pytest.raises(InputError, match=r"three colours \(N, 3, H, W\) for torchattacks/tifgsm, got \(6, 1, 8, 8\)"):
        run("torchattacks/tifgsm", network(), images(), ThreatModel("linf", 0.1))


def test_unknown_class() -> None:
    with pytest.raises(AttributeError, match="offers no Nothing"):
        inward.Nothing  # noqa: B018

"""Foolbox's attacks on robplug targets: results, bounds, starting points, side effects, random numbers, refusals."""

from __future__ import annotations

import foolbox
import pytest
import torch
from torch import Tensor, nn

from robplug.adapters.foolbox import inward
from robplug.errors import ThreatError
from robplug.norms import L2, LINF
from robplug.plugins import registry
from robplug.rng import Rng
from robplug.targets import evaluation_mode, from_module
from robplug.types import Perturbed, ThreatModel


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


def run(
    name: str, module: nn.Module, x: Tensor, threat: ThreatModel, rng: Rng | None = None, **params: object
) -> Perturbed:
    target = from_module(module, bounds=threat.bounds, classes=6)
    with evaluation_mode(module):
        y = target.predict(x) if len(x) else torch.zeros(0, dtype=torch.int64)
    goal = {"y_goal": (y + 1) % 6} if threat.targeted else {}
    attack = registry().attack(f"foolbox/{name}", **params)
    return attack.run(target, x, y, threat, rng or Rng(0, range(len(x))), **goal)


@pytest.mark.parametrize("targeted", [False, True])
def test_result_is_the_librarys_clipped_and_its_claim(targeted: bool) -> None:
    module, x = network(), images()
    y = module(x).argmax(1)
    model = foolbox.PyTorchModel(module, bounds=(0, 1), device="cpu")
    goal = (
        foolbox.criteria.TargetedMisclassification((y + 1) % 6) if targeted else foolbox.criteria.Misclassification(y)
    )
    own = foolbox.attacks.LinfPGD(steps=5, abs_stepsize=0.01, random_start=False)
    _, clipped, is_adv = own(model, x, goal, epsilons=0.03)
    params = {"steps": 5, "abs_stepsize": 0.01, "random_start": False}
    ours = run("linf-projected-gradient-descent", module, x, ThreatModel("linf", 0.03, targeted=targeted), **params)
    assert torch.equal(ours.x_adv, clipped)
    assert torch.equal(ours.claim, is_adv)


@pytest.mark.parametrize("bounds", [(-1.0, 1.0), (-2.1171875, 2.640625), (0.0, 255.0)])
@pytest.mark.parametrize(("name", "norm"), [("linf-projected-gradient-descent", LINF), ("l2-fast-gradient", L2)])
def test_no_rounding_out_of_ball_and_box(bounds: tuple[float, float], name: str, norm: object) -> None:
    scale = bounds[1] - bounds[0]
    x = ((images(64) * 1.4 - 0.2).clamp(0, 1) * scale + bounds[0]).clamp(*bounds)
    threat = ThreatModel(norm.name, 8 / 255 * scale, bounds)
    x_adv = run(name, network(), x, threat).x_adv
    assert norm.distance(x, x_adv).max() <= norm.allowed(threat.eps, 64, bounds)
    assert x_adv.min() >= bounds[0] and x_adv.max() <= bounds[1]


def test_no_rounding_out_of_the_box_where_the_ball_is_wider() -> None:
    """Foolbox's clipping adds the change to the sample again: -2.1 + (2.64 + 2.1) need not be 2.64."""
    bounds = (-2.1171875, 2.640625)
    x = images(64) * 4.7 - 2.1
    x_adv = run("l2-fast-gradient", network(), x, ThreatModel("l2", 1000.0, bounds)).x_adv
    assert x_adv.min() == bounds[0] and x_adv.max() == bounds[1]


@pytest.mark.parametrize(
    ("name", "threat", "params"),
    [
        ("hop-skip-jump", ThreatModel("l2"), {"steps": 3, "initial_gradient_eval_steps": 10}),
        ("hop-skip-jump", ThreatModel("linf"), {"steps": 2, "initial_gradient_eval_steps": 10}),
        ("gen", ThreatModel("linf", 0.2, targeted=True), {"steps": 3}),
    ],
)
def test_attacks_that_clip_to_the_unit_box_get_one(name: str, threat: ThreatModel, params: dict) -> None:
    """These two of Foolbox clip to [0, 1] whatever the model's bounds: on [2, 6] their own results leave the box."""
    low, scale = 2.0, 4.0
    x = images()
    unit = run(name, Affine(network(), scale, low), x, threat, **params)
    wide_threat = ThreatModel(threat.norm, threat.eps and threat.eps * scale, (low, low + scale), threat.targeted)
    wide = run(name, network(), x * scale + low, wide_threat, **params)
    assert torch.allclose(wide.x_adv, unit.x_adv * scale + low, atol=1e-4)
    assert float((unit.x_adv - x).abs().max()) > 1e-2
    assert torch.equal(wide.claim, unit.claim)


@pytest.mark.filterwarnings("ignore:LinearSearchBlendedUniformNoiseAttack failed")
@pytest.mark.parametrize("name", ["boundary", "hop-skip-jump"])
def test_a_sample_without_a_start_does_not_take_the_others_along(name: str) -> None:
    """Left to itself the library raises for the whole batch; here random noise is always of class 0."""

    class Corner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            far = (x - 0.5).abs().flatten(1).amax(1) < 0.01
            return torch.stack([~far, far], 1).float()

    x = torch.rand(3, 1, 4, 4)
    x[1] = 0.5
    model = foolbox.PyTorchModel(Corner().eval(), bounds=(0, 1), device="cpu")
    with pytest.raises(ValueError, match="init_attack failed for"):
        foolbox.attacks.BoundaryAttack(steps=5)(model, x, torch.tensor([0, 1, 0]), epsilons=None)
    found = run(name, Corner(), x, ThreatModel("l2"), steps=5)
    assert found.claim.tolist() == [False, True, False]
    assert torch.equal(found.x_adv[0], x[0]) and torch.equal(found.x_adv[2], x[2])
    assert not torch.equal(found.x_adv[1], x[1])


def test_hop_skip_jump_does_not_depend_on_the_neighbours() -> None:
    """Foolbox norms the gradient estimate over the whole batch: a sample's step shrinks with the batch."""
    x, params = images(), {"steps": 3, "initial_gradient_eval_steps": 10}
    together = run("hop-skip-jump", network(), x, ThreatModel("l2"), Rng(0, range(6)), **params)
    alone = run("hop-skip-jump", network(), x[2:3], ThreatModel("l2"), Rng(0, [2]), **params)
    assert together.claim.all()
    assert torch.allclose(together.x_adv[2:3], alone.x_adv, atol=1e-5)


@pytest.mark.parametrize("name", ["l2-carlini-wagner", "ead"])
def test_where_a_minimal_attack_finds_nothing_the_sample_is_the_clean_one(name: str) -> None:
    """The library leaves an image of zeros there, and claims success where that happens to be of another class."""
    x, module = images(), network()
    norm = "l1" if name == "ead" else "l2"
    threat = ThreatModel(norm, targeted=True)
    found = run(name, module, x, threat, steps=1, binary_search_steps=1, initial_const=1e-9)
    lucky = module(torch.zeros_like(x)).argmax(1) == (module(x).argmax(1) + 1) % 6
    assert torch.equal(found.claim, lucky) and not lucky.all()
    assert torch.equal(found.x_adv[~lucky], x[~lucky])


@pytest.mark.parametrize(
    ("name", "norm"), [("linf-projected-gradient-descent", "linf"), ("l2-carlini-wagner", "l2"), ("boundary", "l2")]
)
def test_model_is_left_as_it_was(name: str, norm: str) -> None:
    """Foolbox leaves gradients in every weight, and takes the model in the mode in which it is."""
    module = network().train()
    module[1].eval()  # a frozen batch norm in a training network
    module[0].weight.requires_grad_(False)
    module[5].weight.grad = torch.full_like(module[5].weight, 7.0)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    eps = 0.1 if norm == "linf" else None
    run(name, module, images(), ThreatModel(norm, eps), steps=5)
    assert module.training and not module[1].training and module[3].training
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    assert not module[0].weight.requires_grad and module[5].weight.requires_grad
    assert module[0].weight.grad is None and module[5].bias.grad is None
    assert (module[5].weight.grad == 7.0).all()


def test_the_library_alone_writes_weight_gradients() -> None:
    """The symptom that the test above is about; when this fails, the library has been mended."""
    module = network()
    model = foolbox.PyTorchModel(module, bounds=(0, 1), device="cpu")
    foolbox.attacks.FGSM()(model, images(), torch.arange(6), epsilons=0.1)
    assert module[5].weight.grad is not None


def test_draws_follow_the_rng_and_leave_the_global_one_alone() -> None:
    module, x = network(), images()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    threat = ThreatModel("linf", 0.1)
    results = [run("linf-additive-uniform-noise", module, x, threat, Rng(seed, range(6))).x_adv for seed in (0, 0, 1)]
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_empty_batch() -> None:
    found = run("linf-projected-gradient-descent", network(), images()[:0], ThreatModel("linf", 0.1))
    assert found.x_adv.shape == (0, 1, 8, 8)


@pytest.mark.parametrize(
    ("name", "threat", "message"),
    [
        ("l2-deep-fool", ThreatModel("linf"), "expected a norm that foolbox/l2-deep-fool serves (l2), got linf"),
        ("l2-deep-fool", ThreatModel("l2", targeted=True), "foolbox/l2-deep-fool serves, got targeted=True"),
        ("gen", ThreatModel("linf", 0.1), "foolbox/gen serves, got targeted=False"),
        ("linf-projected-gradient-descent", ThreatModel("linf"), "expected a threat with eps"),
    ],
)
def test_threats_that_an_attack_cannot_serve(name: str, threat: ThreatModel, message: str) -> None:
    with pytest.raises(ThreatError) as caught:
        run(name, network(), images(), threat)
    assert message in str(caught.value)


def test_unknown_class() -> None:
    with pytest.raises(AttributeError, match="offers no Nothing"):
        inward.Nothing  # noqa: B018

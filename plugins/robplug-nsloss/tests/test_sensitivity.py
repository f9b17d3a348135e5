"""NsLoss: against closed forms, and its gradient against one graph of all passes written out by hand."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robplug.errors import InputError
from robplug_nsloss import layer_sensitivity, ns_loss

F64 = torch.float64


def draws_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Network(nn.Module):
    """Batch norm used twice, ReLUs of each kind; what it computes stands once more in ``activations``."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.bn, self.act, self.drop = nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(dropout)
        self.linear, self.unused = nn.Linear(4 * 25, 3), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.bn(self.conv1(x)))
        h = h + self.act(self.bn(self.conv2(self.drop(h))))
        h = F.gelu(self.conv2(h)).relu_()
        return self.linear(F.dropout(h, 0.5 if self.drop.p else 0.0, self.training).flatten(1))  # type: ignore[no-any-return]

    def activations(self, x: Tensor, norm: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
        first = F.relu(norm(0, self.conv1(x)))
        second = F.relu(norm(1, self.conv2(first)))
        third = F.gelu(self.conv2(first + second))
        fourth = F.relu(third)
        return [first, second, third, fourth, self.linear(fourth.flatten(1))]


def plain_ns_loss(
    model: Network, x: Tensor, radius: float, draws: int, seed: int, clip: tuple[float, float] | None = None
) -> Tensor:
    """The formula with all passes in one graph."""
    bn, known = model.bn, {}

    def clean_norm(use: int, h: Tensor) -> Tensor:
        known[use] = (h.mean((0, 2, 3)).detach(), h.var((0, 2, 3), correction=0).detach())
        return F.batch_norm(h, None, None, bn.weight, bn.bias, training=True) if bn.training else fixed(h)

    def fixed(h: Tensor) -> Tensor:
        return F.batch_norm(h, bn.running_mean.clone(), bn.running_var.clone(), bn.weight, bn.bias)  # type: ignore[union-attr]

    def noisy_norm(use: int, h: Tensor) -> Tensor:
        return F.batch_norm(h, *known[use], bn.weight, bn.bias) if bn.training else fixed(h)

    clean = model.activations(x, clean_norm)
    generator, total = draws_of(seed), torch.zeros((), dtype=x.dtype)
    for _ in range(draws):
        noise = torch.randn(x.shape, dtype=x.dtype, generator=generator)
        moved = x + radius * noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        moved = moved if clip is None else moved.clamp(*clip)
        for a, b in zip(clean, model.activations(moved, noisy_norm), strict=True):
            total = total + (b - a).abs().mean() / (draws * radius)
    return total


def network(dropout: float = 0.0) -> Network:
    torch.manual_seed(0)
    model = Network(dropout).to(F64)
    with torch.no_grad():
        model.bn.weight.uniform_(0.5, 1.5)
        model.bn(torch.randn(16, 4, 5, 5, dtype=F64))
    return model


def images(count: int = 6) -> Tensor:
    torch.manual_seed(1)
    return torch.rand(count, 2, 5, 5, dtype=F64)


def gradients(value: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(model.parameters()), materialize_grads=True))


@pytest.mark.parametrize("width", [2, 7, 30])
def test_closed_form_of_a_linear_layer(width: int) -> None:
    """E |<w, delta>| / ||delta|| = ||w|| Gamma(d/2) / (sqrt(pi) Gamma((d+1)/2)); the radius cancels."""
    torch.manual_seed(0)
    layer = nn.Linear(width, 40).double()
    x = torch.randn(1000, width, dtype=F64)
    ratio = math.gamma(width / 2) / (math.sqrt(math.pi) * math.gamma((width + 1) / 2))
    expected = float(layer.weight.norm(dim=1).mean().detach()) * ratio
    found = [
        float(ns_loss(layer, x, radius=radius, draws=20, layers=["logits"], generator=draws_of(3)).detach())
        for radius in (0.1, 1.0, 30.0)
    ]
    assert found[0] == pytest.approx(expected, rel=0.01)  # 20,000 draws: the standard error is below 0.6 %
    assert found == pytest.approx([found[0]] * 3, rel=1e-9)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("clip", [None, (0.0, 1.0)])
def test_value_and_gradient_are_those_of_the_plain_formula(training: bool, clip: tuple[float, float] | None) -> None:
    model, x = network().train(training), images()
    state = copy.deepcopy(model.state_dict())
    expected = plain_ns_loss(model, x, 0.7, 3, seed=5, clip=clip)
    found = ns_loss(model, x, radius=0.7, draws=3, generator=draws_of(5), clip=clip)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    for (name, _), a, b in zip(
        model.named_parameters(), gradients(2.5 * found, model), gradients(2.5 * expected, model), strict=True
    ):
        # largest first: convolutions before batch norm have a bias without effect, whose gradient is rounding
        assert (a - b).abs().max() <= 1e-12 * max(1.0, float(b.abs().max())), name
    assert model.training == training and all(torch.equal(model.state_dict()[key], state[key]) for key in state)


def test_dropout_is_off_and_batch_norm_is_as_it_was() -> None:
    wet, x = network(dropout=0.5).train(), images()
    before = torch.get_rng_state()
    found = ns_loss(wet, x, generator=draws_of(0))
    assert torch.equal(torch.get_rng_state(), before)
    expected = plain_ns_loss(wet, x, 1.0, 5, seed=0)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert wet.drop.training and wet.bn.training


def test_batch_norm_without_running_statistics_uses_those_of_the_clean_batch() -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), nn.Flatten()
    model, x = nn.Sequential(*layers, nn.Linear(36, 3)).double().eval(), images()
    found = ns_loss(model, x, draws=1, generator=draws_of(0))
    noise = torch.randn(x.shape, dtype=F64, generator=draws_of(0))
    clean, noisy = model[0](x), model[0](x + noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1))
    mean, var = clean.mean((0, 2, 3)).detach(), clean.var((0, 2, 3), correction=0).detach()
    first, second = (F.relu(F.batch_norm(h, mean, var, model[1].weight, model[1].bias)) for h in (clean, noisy))
    expected = (first - second).abs().mean() + (model[4](first.flatten(1)) - model[4](second.flatten(1))).abs().mean()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    assert model[1].running_mean is None and not model[1].training


def test_global_generator_draws_without_another() -> None:
    model, x = network().eval(), images()
    torch.manual_seed(9)
    found = ns_loss(model, x).detach()
    assert torch.equal(found, ns_loss(model, x, generator=draws_of(9)).detach())


def test_a_network_that_noise_does_not_reach_has_neither_loss_nor_gradient() -> None:
    """Translations of the input change nothing, and dead neurons give no 0 / 0."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    nn.init.zeros_(model[0].weight)
    nn.init.constant_(model[0].bias, -1.0)
    found = ns_loss(model, torch.randn(5, 4))
    assert found == 0 and all((g == 0).all() for g in gradients(found, model))
    assert all(row.change == 0 and row.relative == 0 for row in layer_sensitivity(model, torch.randn(5, 4)))


def test_parameters_that_share_a_gradient_keep_their_own() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x * (self.a + self.b))

    model, x = Shared().double(), torch.rand(6, 4, dtype=F64) - 0.3
    found = gradients(ns_loss(model, x, draws=3, generator=draws_of(0)), model)
    generator = draws_of(0)
    total = torch.zeros((), dtype=F64)
    for _ in range(3):
        noise = torch.randn(6, 4, dtype=F64, generator=generator)
        total = total + (model(x + noise / noise.norm(dim=1, keepdim=True)) - model(x)).abs().mean() / 3
    for a, b in zip(found, gradients(total, model), strict=True):
        assert torch.allclose(a, b, atol=1e-14, rtol=0)


def test_frozen_parameters_and_no_grad() -> None:
    model, x = network().eval(), images()
    expected = gradients(ns_loss(model, x, generator=draws_of(0)), model)
    model.conv1.requires_grad_(False)
    value = ns_loss(model, x, generator=draws_of(0))
    (found,) = torch.autograd.grad(value, model.linear.weight)
    names = [name for name, _ in model.named_parameters()]
    assert torch.allclose(found, expected[names.index("linear.weight")], atol=1e-14)
    with torch.no_grad():
        assert torch.equal(ns_loss(model, x, generator=draws_of(0)), value.detach())
    assert not ns_loss(model.requires_grad_(False), x).requires_grad


def test_layers_without_anything_to_train_before_them() -> None:
    """Gradients by the rest are those of a network that is trained as a whole."""
    model, x = network().eval(), images()
    names = [name for name, _ in model.named_parameters()]
    expected = gradients(ns_loss(model, x, generator=draws_of(0)), model)
    for part in (model.conv1, model.bn, model.conv2):
        part.requires_grad_(False)
    (found,) = torch.autograd.grad(ns_loss(model, x, generator=draws_of(0)), model.linear.weight)
    assert torch.allclose(found, expected[names.index("linear.weight")], atol=1e-14)


def test_one_noisy_copy_is_held_at_a_time() -> None:
    model, x = network().train(), images()
    passes: list[list[weakref.ref[Tensor]]] = []
    alive: list[list[int]] = []

    def begins(*_: object) -> None:
        alive.append([sum(ref() is not None for ref in refs) for refs in passes])
        passes.append([])

    model.register_forward_pre_hook(begins)
    for part in (model.conv1, model.conv2, model.linear):
        part.register_forward_hook(lambda _, __, out: passes[-1].append(weakref.ref(out.untyped_storage())))
    loss = ns_loss(model, x, draws=4)
    assert len(alive) == 5 and [counts[1:] for counts in alive[2:]] == [[0], [0, 0], [0, 0, 0]]
    assert loss.requires_grad


def test_half_precision_does_not_underflow() -> None:
    """1 / numel is 5.6 times the smallest number in half precision, and would be rounded to 6 times."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 5000), nn.ReLU(), nn.Linear(5000, 2)), torch.randn(600, 8)
    with torch.autocast("cpu", torch.float16):
        value = ns_loss(model, x, draws=1, radius=4.0, layers=["1"], generator=draws_of(0))
    loss_scale = torch.tensor(2.0**16)  # as a GradScaler has it
    (found,) = torch.autograd.grad(value, model[0].weight, loss_scale.to(value))
    noise = torch.randn(x.shape, generator=draws_of(0))
    moved = x + 4 * noise / noise.norm(dim=1, keepdim=True)
    plain = (model[:2](moved) - model[:2](x)).abs().mean() / 4
    (expected,) = torch.autograd.grad(plain, model[0].weight)
    assert (found.float() / loss_scale - expected).norm() <= 0.01 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("affine", [True, False])
def test_half_precision_with_the_statistics_of_the_clean_batch(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, affine: bool
) -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, affine=affine), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    model, x, noise = nn.Sequential(*layers).to(dtype), torch.rand(6, 2, 8, 8), torch.randn(6, 2, 8, 8)
    found = []
    for precision in (dtype, F64):
        monkeypatch.setattr(torch, "randn", lambda *_, precision=precision, **__: noise.to(precision))
        found.append(float(ns_loss(model.to(precision), x.to(precision), radius=4.0, draws=1).detach()))
    assert found[0] == pytest.approx(found[1], rel=4 * torch.finfo(dtype).eps)


def test_layers_are_the_shares_of_the_loss() -> None:
    model, x = network().eval(), images()
    rows = layer_sensitivity(model, x, radius=0.5, draws=3, generator=draws_of(2))
    assert [row.name for row in rows] == ["act:relu", "act:relu#2", "gelu", "relu", "logits"]
    loss = ns_loss(model, x, radius=0.5, draws=3, generator=draws_of(2))
    assert sum(row.change for row in rows) / 0.5 == pytest.approx(float(loss.detach()), rel=1e-12)


def test_rescaled_layers_change_the_loss_but_not_the_relative_sensitivity() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double(), torch.randn(50, 4, dtype=F64)
    before = layer_sensitivity(model, x, generator=draws_of(0))
    with torch.no_grad():
        model[0].weight /= 10
        model[0].bias /= 10
        model[2].weight *= 10
    after = layer_sensitivity(model, x, generator=draws_of(0))
    assert after[0].change == pytest.approx(before[0].change / 10, rel=1e-9)
    assert after[1].change == pytest.approx(before[1].change, rel=1e-9)
    assert [row.relative for row in after] == pytest.approx([row.relative for row in before], rel=1e-9)


def test_a_layer_that_only_noise_awakes_has_no_finite_relative_change() -> None:
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 3))
    first, _ = layer_sensitivity(model, torch.zeros(5, 4))
    assert first.change > 0 and first.relative == math.inf


def test_inputs_of_another_network_in_front_get_no_gradient() -> None:
    x = images().requires_grad_()
    loss = ns_loss(network().eval(), x)
    assert torch.autograd.grad(loss, x, allow_unused=True) == (None,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"radius": 0.0}, "expected a finite radius > 0, got 0.0"),
        ({"radius": -1.0}, "expected a finite radius > 0, got -1.0"),
        ({"radius": float("nan")}, "expected a finite radius > 0, got nan"),
        ({"draws": 0}, "expected draws from 1 to 127, got 0"),
        ({"draws": 128}, "expected draws from 1 to 127, got 128"),
        ({"layers": ["linaer"]}, "expected a layer of Network, got 'linaer'; there is linear"),
        ({"x": torch.zeros(0, 2, 5, 5)}, r"expected a batch of at least one sample .*, got \(0, 2, 5, 5\)"),
        ({"x": torch.zeros(2, 2, 5, 5, dtype=torch.int64)}, r"of a floating dtype, got \(2, 2, 5, 5\) torch.int64"),
    ],
)
def test_bad_input(options, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        ns_loss(network(), **{"x": images(), **options})


def test_activations_that_are_not_finite_are_named() -> None:
    model = network().eval()
    with torch.no_grad():
        model.conv2.weight[0, 0, 0, 0] = math.nan
    with pytest.raises(
        InputError, match="expected finite activations, got NaN or infinity in act:relu#2; it comes first"
    ):
        ns_loss(model, images())


def test_a_forward_that_depends_on_values_is_refused() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(F.relu(x)) if (x == 0).all() else F.relu(x) + 0

    with pytest.raises(
        InputError, match=r"expected the layers of the clean pass \(relu, relu#2\) in that of noisy samples"
    ):
        ns_loss(Branch(), torch.zeros(2, 3))

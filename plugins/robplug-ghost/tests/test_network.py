"""GhostNetwork: what it finds, what a ghost computes, which ghosts there are, and that the base stays as it is."""

from __future__ import annotations

import copy
import doctest
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robplug.errors import InputError
from robplug.isolation import ModuleState
from robplug.zoo import LeNet, digits_cnn, resnet20
from robplug.zoo_cifar import ResNet18, resnet18, vgg11
from robplug_ghost import GhostNetwork, erode_add, erode_dropout, network
from robplug_ghost.kernels import reference

X = torch.rand(2, 3, 16, 16)


class BasicBlock(nn.Module):
    """As torchvision writes it: one ReLU for all, addition in place."""

    def __init__(self, channels: int, downsample: nn.Module | None = None, stride: int = 1) -> None:
        super().__init__()
        channels_in = channels if downsample is None else channels // 2
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """As torchvision's: stages are Sequentials of blocks; `forward` calls another method."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        downsample = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
        self.layer1 = nn.Sequential(BasicBlock(8), BasicBlock(8))
        self.layer2 = nn.Sequential(BasicBlock(16, downsample, 2), BasicBlock(16))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 10)

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(self.layer2(self.layer1(x))), 1))

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)


class PreActivation(nn.Module):
    """x + body(x), no activation behind, with a scale of its own and an argument that has a default."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.BatchNorm2d(channels), nn.GELU(), nn.Conv2d(channels, channels, 3, padding=1))
        self.gamma = nn.Parameter(torch.rand(channels, 1, 1))

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        branch = self.gamma * self.body(x)
        if scale is not None:
            branch = branch * scale
        return torch.add(branch, x)


class Dynamic(nn.Module):
    """What the trace of a module cannot follow."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.skip = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        return self.skip(x) + (h if h.sum() > 0 else -h)


class Inception(nn.Module):
    """Branches that are concatenated."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.one, self.three = nn.Conv2d(channels_in, channels, 1), nn.Conv2d(channels_in, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x)], 1).relu()


def spread(model: nn.Module) -> nn.Module:
    """Returns a network in eval mode whose batch norm statistics are those of no identity."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


def plain_sequence() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), *(PreActivation(4) for _ in range(2)), nn.Flatten(), nn.Linear(1024, 5))


def inception() -> nn.Module:
    blocks = nn.Sequential(Inception(3, 4), Inception(8, 4))
    return nn.Sequential(nn.Conv2d(3, 3, 1), blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


@pytest.mark.parametrize(
    ("make", "places", "formula"),
    [
        (resnet20, [f"layer{i}.{j}" for i in (1, 2, 3) for j in range(3)], "relu(w * pad + bn2)"),
        (resnet18, [f"blocks.{i}" for i in range(8)], "relu(w * shortcut + bn2)"),
        (ResNet, ["layer1.0", "layer1.1", "layer2.0", "layer2.1"], None),
        (plain_sequence, ["1", "2"], "w * x + mul"),
        (lambda: nn.Sequential(ResNet()), ["0.layer1.0", "0.layer1.1", "0.layer2.0", "0.layer2.1"], None),
    ],
)
def test_it_finds_residual_additions(make: Any, places: list[str], formula: str | None) -> None:
    ghost = GhostNetwork(make(), skip=0.2, dropout=0.9)
    skips = [line for line in ghost.found if line.startswith("skip erosion in ")]
    drops = [line.removeprefix("dropout erosion after ") for line in ghost.found if line not in skips]
    assert [line.split(":")[0].removeprefix("skip erosion in ") for line in skips] == drops == places
    if formula is not None:
        assert {line.partition(": ")[2] for line in skips} == {formula}
    assert all(line in repr(ghost) for line in ghost.found)


def test_the_projection_is_the_shortcut_and_relu_is_taken_along() -> None:
    lines = GhostNetwork(ResNet(), skip=0.2).found
    assert lines[0] == "skip erosion in layer1.0: relu(w * x + bn2)"
    assert lines[2] == "skip erosion in layer2.0: relu(w * downsample + bn2)"


@pytest.mark.parametrize(
    ("make", "blocks"),
    [
        (vgg11, ["features.3", "features.7", "features.14", "features.21", "features.28"]),
        (inception, ["1.0", "1.1"]),
    ],
)
def test_it_finds_blocks_of_plain_networks(make: Any, blocks: list[str]) -> None:
    found = GhostNetwork(make(), dropout=0.9).found
    assert found == tuple(f"dropout erosion after {name}" for name in blocks)


@pytest.mark.parametrize(
    ("name", "skip", "dropout", "last"),
    [
        ("resnet50", 0.22, 1.0, "skip erosion in layer4.2: relu(w * x + bn3)"),
        ("mobilenet_v2", 0.22, 1.0, "skip erosion in features.16: w * x + conv"),
        ("vgg11", 0.0, 0.99, "dropout erosion after features.20"),
        ("inception_v3", 0.0, 0.99, "dropout erosion after Mixed_7c"),
    ],
)
def test_networks_of_torchvision(name: str, skip: float, dropout: float, last: str) -> None:
    try:
        from torchvision import models
    except Exception as error:  # its compiled part may be of another torch
        pytest.skip(f"torchvision: {error}")
    model = models.get_model(name, weights=None).eval()
    assert GhostNetwork(model, skip, dropout).found[-1] == last
    x = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(GhostNetwork(model, skip and 1e-30, 1 - (1 - dropout) * 1e-14)(x), model(x))


def test_sums_of_equals_are_no_residual_additions() -> None:
    class Twin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x) + 1

    with pytest.raises(InputError, match=r"residual additions to be eroded, got none in Twin; .*shortcuts="):
        GhostNetwork(Twin(), skip=0.2)


@pytest.mark.parametrize("make", [resnet20, lambda: ResNet18(10, width=8), ResNet, plain_sequence])
def test_an_erosion_of_nothing_is_the_base_bit_for_bit(make: Any) -> None:
    """So little that float32 weights are 1 and nothing is dropped, with every erosion at work; and none at all."""
    model = spread(make())
    expected = model(X)
    for skip, dropout in ((1e-30, 1 - 1e-16), (1e-30, 1.0), (0.0, 1.0)):
        ghost = GhostNetwork(model, skip, dropout)
        assert torch.equal(ghost(X), expected)
        assert (ghost._ghost.erosions > 0) == (skip > 0)


def test_a_ghost_is_its_definition() -> None:
    """Against the forward of ResNet written out, with the weights and masks of the kernels."""
    model, seed = spread(ResNet()), 99
    ghost = GhostNetwork(model, skip=0.3, dropout=0.8, ghosts=1, seed=seed)

    h = model.maxpool(F.relu(model.bn1(model.conv1(X))))
    blocks = [*model.layer1, *model.layer2]
    for layer, block in enumerate(blocks):
        shortcut = h if block.downsample is None else block.downsample(h)
        residual = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(h)))))
        w = reference.channel_weights(seed, layer, shortcut.shape[1], 0.3)[:, None, None]
        mask = reference.kept(
            seed, layer, h.shape[1] if block.downsample is None else 16, shortcut[0, 0].numel(), 0.8, X.device
        )
        h = F.relu(w * shortcut + residual) * mask.view(shortcut.shape[1:]) / 0.8
    torch.testing.assert_close(ghost(X), model.fc(h.mean((2, 3))), rtol=1e-5, atol=1e-5)


def test_an_addition_may_be_the_shortcut_of_the_next() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = (x + self.a(x)).relu()
            return self.b(h) + h

    model = Two()
    h = erode_add(X, model.a(X), 6, 0, 0.3, "relu")
    expected = erode_add(h, model.b(h), 6, 1, 0.3)
    assert torch.equal(GhostNetwork(model, skip=0.3, ghosts=1, seed=6)(X), expected)


def test_for_a_linear_block_the_mean_over_ghosts_is_the_base_and_the_variance_that_of_the_weights() -> None:
    """Mean x + conv(x); variance skip**2 / 3 * x**2."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv(x)

    model, x, draws = Linear().double(), torch.randn(1, 3, 4, 4).double(), 1500
    ghost = GhostNetwork(model, skip=0.22)
    with torch.no_grad():
        out = torch.cat([ghost(x) for _ in range(draws)])
    variance = 0.22**2 / 3 * x[0].square()
    assert ((out.mean(0) - model(x)[0]).abs() <= 5 * (variance / draws).sqrt()).all()
    torch.testing.assert_close(out.var(0), variance, rtol=5 * math.sqrt(0.8 / draws), atol=0)


@pytest.mark.parametrize(("skip", "dropout"), [(0.22, 1.0), (0.0, 0.8), (0.22, 0.8)])
def test_a_ghost_is_a_seed(skip: float, dropout: float) -> None:
    model = spread(ResNet())
    ghost = GhostNetwork(model, skip, dropout, seed=5)
    outs, seeds = [], []
    for _ in range(4):
        outs.append(ghost(X))
        seeds.append(ghost.seed)
    assert seeds[0] == 5 and len(set(seeds)) == 4
    assert all(not torch.equal(a, b) for i, a in enumerate(outs) for b in outs[:i])
    ghost.resample(5)
    assert all(torch.equal(ghost(X), out) for out in outs)
    fixed = GhostNetwork(model, skip, dropout, ghosts=1)
    for seed, out in zip(seeds, outs, strict=True):
        fixed.resample(seed)
        assert torch.equal(fixed(X), out) and torch.equal(fixed(X), out)
    # one network for all samples, in whatever batch
    torch.testing.assert_close(torch.cat([fixed(X[1:]), fixed(X[:1])]), fixed(X.flip(0)), rtol=1e-4, atol=1e-5)
    twins = fixed(X[:1].expand(3, -1, -1, -1))
    torch.testing.assert_close(twins[0], twins[2], rtol=1e-5, atol=1e-6)


def test_a_standard_ensemble_is_the_mean_over_the_first_ghosts_of_the_series() -> None:
    model = spread(ResNet())
    longitudinal = GhostNetwork(model, 0.22, 0.9, seed=3)
    ensemble = GhostNetwork(model, 0.22, 0.9, ghosts=4, seed=3)
    mean = torch.stack([longitudinal(X) for _ in range(4)]).mean(0)
    assert torch.equal(ensemble(X), mean) and torch.equal(ensemble(X), mean)


def test_the_gradient_is_that_of_the_ghost() -> None:
    ghost = GhostNetwork(spread(ResNet()).double(), 0.22, 0.9, ghosts=1, seed=3)
    x = X[:1, :, :6, :6].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ghost(x).softmax(1), (x,), fast_mode=True)


def test_a_pass_in_between_does_not_change_a_gradient() -> None:
    """The erosions of a pass are those of its gradient, whatever ghost has come since."""
    model = spread(ResNet())
    ghost, x = GhostNetwork(model, 0.5, 0.7), X.clone().requires_grad_()
    out = ghost(x)
    ghost(x)
    (late,) = torch.autograd.grad(out.sum(), x)
    ghost.resample(0)
    (at_once,) = torch.autograd.grad(ghost(x).sum(), x)
    assert torch.equal(late, at_once)


def test_erosion_is_on_in_both_modes_and_layers_follow_theirs() -> None:
    ghost = GhostNetwork(spread(ResNet()), 0.22, 0.9)
    for mode in (True, False):
        ghost.train(mode)
        assert not torch.equal(ghost(X), ghost(X))
        assert all(part.training == mode for part in ghost.modules())


def test_the_network_stays_as_it_is_and_shares_its_layers() -> None:
    model = spread(ResNet())
    model.avgpool.train()
    state, expected = ModuleState(model, strict=True), model(X)
    ghost = GhostNetwork(model, 0.22, 0.9)
    torch.autograd.grad(ghost(X).sum(), list(ghost.parameters()))
    assert state.restore() == [] and torch.equal(model(X), expected)
    assert {id(p) for p in ghost.parameters()} == {id(p) for p in model.parameters()}
    assert len(list(ghost.parameters())) == len(list(model.parameters()))
    ghost.double()
    assert model(X.double()).dtype == torch.float64
    with torch.no_grad():
        model.fc.weight.zero_()
        model.fc.bias.zero_()
    assert (ghost(X.double()) == 0).all()


def test_a_pass_changes_nothing_that_the_referee_watches() -> None:
    ghost = GhostNetwork(spread(ResNet()), 0.22, 0.9)
    state = ModuleState(ghost, strict=True)
    with torch.no_grad():
        ghost(X)
        ghost(X)
    assert state.restore() == []


def pickled(ghost: GhostNetwork) -> GhostNetwork:
    return pickle.loads(pickle.dumps(ghost))  # noqa: S301


@pytest.mark.parametrize("make", [ResNet, plain_sequence])
@pytest.mark.parametrize("how", [copy.deepcopy, pickled])
def test_copies_go_their_own_way(how: Any, make: Any) -> None:
    ghost = GhostNetwork(spread(make()), 0.22, 0.9, seed=11)
    ghost(X)
    twin = how(ghost)
    expected = ghost(X)
    assert torch.equal(twin(X), expected)  # as far in its series as the original was
    twin.resample(4)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert (twin(X) == 0).all()
    ghost.resample(11)
    ghost(X)
    assert torch.equal(ghost(X), expected)


def test_hooks_of_blocks_and_layers_are_called() -> None:
    model, calls = spread(ResNet()), []
    model.layer1[0].register_forward_hook(lambda module, args, out: calls.append("block"))
    model.layer1[0].conv1.register_forward_hook(lambda module, args, out: calls.append("layer"))
    GhostNetwork(model, 0.22, 0.9)(X)
    assert calls == ["layer", "block"]
    model.layer1[0].relu.register_forward_hook(lambda module, args, out: calls.append("relu"))
    GhostNetwork(model, 0.22, 0.9)(X)
    assert calls[2:] == ["layer", "relu", "relu", "block"]


def test_under_autocast_and_without_gradients() -> None:
    ghost = GhostNetwork(spread(ResNet()), 0.22, 0.9, ghosts=1)
    exact = ghost(X)
    with torch.no_grad():
        assert torch.equal(ghost(X), exact)
    with torch.inference_mode():
        assert torch.equal(ghost(X), exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ghost(X.clone().requires_grad_())
        out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=0.1, atol=0.1)


def test_shortcuts_and_blocks_by_name_or_as_modules() -> None:
    """Where nothing can be traced, a module's output is eroded: x is the shortcut of Dynamic."""
    model = nn.Sequential(Dynamic(3)).eval()
    with pytest.raises(InputError, match=r"0 could not be traced, TraceError.*shortcuts="):
        GhostNetwork(model, skip=0.2)
    h = model[0].conv(X)
    h = h if h.sum() > 0 else -h
    for name in ("0.skip", model[0].skip):
        ghost = GhostNetwork(model, skip=0.2, shortcuts=[name], ghosts=1, seed=8)
        torch.testing.assert_close(ghost(X), erode_add(X, h, 8, 0, 0.2))
        assert "skip erosion of the shortcut 0.skip" in repr(ghost) and "not looked into: 0 (TraceError" in repr(ghost)
    ghost = GhostNetwork(model, dropout=0.5, blocks=["0.conv", "0"], ghosts=1, seed=8)
    h = erode_dropout(model[0].conv(X), 8, 0, 0.5)
    torch.testing.assert_close(ghost(X), erode_dropout(X + (h if h.sum() > 0 else -h), 8, 1, 0.5))


def test_a_layer_that_is_used_twice_stays_one() -> None:
    block = BasicBlock(3)
    model = spread(nn.Sequential(block, nn.ReLU(), block))
    ghost = GhostNetwork(model, skip=0.2, ghosts=1)
    assert ghost.network[0] is ghost.network[2] is not block
    assert torch.equal(ghost(X), ghost.network[0](ghost.network[0](X).relu()))


def test_what_a_forward_assigns_while_it_is_traced_does_not_reach_the_network() -> None:
    class Noting(BasicBlock):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = x
            return super().forward(x)

    block = Noting(3)
    GhostNetwork(block, skip=0.2)
    assert not hasattr(block, "seen")


def test_a_forward_that_was_replaced_is_not_traced() -> None:
    """The trace of a class would undo what somebody has done to the object; a ghost's own blocks are such objects."""
    model = ResNet()
    ghost = GhostNetwork(model, skip=0.2)
    with pytest.raises(InputError, match=r"layer1.0 could not be traced, its forward is not that of its class"):
        GhostNetwork(ghost, skip=0.2)
    assert len(GhostNetwork(model, skip=0.2).found) == 4


def test_an_argument_with_a_default_is_refused() -> None:
    block = GhostNetwork(plain_sequence(), skip=0.2).network[1]
    with pytest.raises(TypeError, match="takes 2 positional arguments but 3"):
        block(torch.rand(1, 4, 16, 16), torch.ones(1))


def test_a_buffer_of_the_block_itself_is_not_traced() -> None:
    class Scaled(PreActivation):
        def __init__(self) -> None:
            super().__init__(3)
            self.register_buffer("factor", torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return x + self.factor * self.body(x)

    with pytest.raises(InputError, match="its forward uses its own buffer factor"):
        GhostNetwork(nn.Sequential(Scaled()), skip=0.2)


def test_the_example_runs() -> None:
    results = doctest.testmod(network)
    assert results.attempted > 0 and results.failed == 0


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (resnet20, {"skip": -0.1}, "skip erosion from 0 to 1, got -0.1"),
        (resnet20, {"skip": 1.1}, "skip erosion from 0 to 1, got 1.1"),
        (resnet20, {"skip": math.nan}, "skip erosion from 0 to 1, got nan"),
        (resnet20, {"dropout": 0.0}, "dropout above 0 and up to 1, got 0.0; it is the probability to be kept"),
        (resnet20, {"dropout": 1.2}, "dropout above 0 and up to 1, got 1.2"),
        (resnet20, {"skip": 0.2, "ghosts": 0}, "ghosts to be a number >= 1, or None, got 0"),
        (resnet20, {"skip": 0.2, "ghosts": True}, "ghosts to be a number >= 1, or None, got True"),
        (resnet20, {"skip": 0.2, "seed": -1}, r"a seed from 0 to 2\*\*63 - 1, got -1"),
        (resnet20, {"skip": 0.2, "shortcuts": ["layer1.9"]}, "'layer1.9'; did you mean layer1"),
        (resnet20, {"skip": 0.2, "shortcuts": []}, "residual additions to be eroded, got none in CifarResNet"),
        (resnet20, {"dropout": 0.9, "blocks": [nn.Linear(1, 1)]}, "modules of the network, got another Linear"),
        (digits_cnn, {"skip": 0.2}, "residual additions to be eroded, got none in DigitsCNN; name the modules"),
        (LeNet, {"dropout": 0.9}, "top-level blocks to be eroded, got none in LeNet; name the modules"),
    ],
)
def test_bad_input_is_refused_with_value_and_remedy(make: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        GhostNetwork(make(), **options)


def test_a_module_that_does_not_take_part_is_refused_in_the_first_pass() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with pytest.raises(InputError, match="an erosion that takes part in the forward pass, got none of 1"):
        GhostNetwork(Lazy(), dropout=0.9, blocks=["spare"])(X)


def test_a_block_that_returns_no_tensor_is_refused() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(InputError, match="one tensor, got a tuple from Pair"):
        GhostNetwork(nn.Sequential(Pair()), dropout=0.9, blocks=["0"])(X)

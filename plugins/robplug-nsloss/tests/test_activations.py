"""What is collected from a forward pass: every ReLU-like output once, as it was when it was computed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robplug.errors import InputError
from robplug_nsloss.activations import RELU_LIKE, recording

MODULES = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "prelu": nn.PReLU,
    "rrelu": nn.RReLU,
    "elu": nn.ELU,
    "celu": nn.CELU,
    "selu": nn.SELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "softplus": nn.Softplus,
    "hardswish": nn.Hardswish,
}


class Calls(nn.Module):
    """A linear layer, then a given function."""

    def __init__(self, then) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.linear, self.then = nn.Linear(4, 4), then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.linear(x))  # type: ignore[no-any-return]


class Nested(nn.Module):
    """A module of a module that is used twice, functions, and operations in place."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(in_place)))
        self.second, self.act, self.in_place = nn.Linear(4, 4), nn.SiLU(in_place), in_place

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.second(self.act(self.second(self.first(x)))))
        if self.in_place:
            h += 1
            h = h.mul_(2)
            h[:, :2] = 0.5
            return F.relu(h - 1, inplace=True).relu_()
        h = (h + 1) * 2
        h = torch.cat([torch.full_like(h[:, :2], 0.5), h[:, 2:]], dim=1)
        return torch.relu(F.relu(h - 1))


def collected(model: nn.Module, layers: list[str] | None = None, x: Tensor | None = None) -> dict[str, Tensor]:
    with recording(model, layers) as recorder:
        model(torch.linspace(-2, 2, 8).view(2, 4) if x is None else x)
    return dict(zip(recorder.names, recorder.tensors, strict=True))


@pytest.mark.parametrize("kind", sorted(MODULES))
def test_a_module_is_collected_once(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), MODULES[kind](), nn.Linear(4, 3)).eval()
    x = torch.randn(2, 4)
    found = collected(model, x=x)
    name = "hardtanh" if kind == "relu6" else kind  # what nn.ReLU6 calls
    assert list(found) == [f"1:{name}", "logits"]
    assert torch.equal(found[f"1:{name}"], model[:2](x)) and torch.equal(found["logits"], model(x))


def test_every_kind_has_a_module() -> None:
    assert set(MODULES) == set(RELU_LIKE)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (F.relu, "relu"),
        (torch.relu, "relu"),
        (torch.relu_, "relu"),
        (Tensor.relu, "relu"),
        (Tensor.relu_, "relu"),
        (lambda h: F.relu(h, True), "relu"),
        (lambda h: h.relu(), "relu"),
        (F.relu6, "relu6"),
        (lambda h: F.hardtanh(h, 0.0, 4.0), "hardtanh"),
        (lambda h: F.leaky_relu(h, 0.2, True), "leaky_relu"),
        (F.gelu, "gelu"),
        (lambda h: F.elu_(h), "elu"),
        (torch.celu, "celu"),
        (torch.selu_, "selu"),
    ],
)
def test_functions_are_collected_however_called(function, name: str) -> None:  # type: ignore[no-untyped-def]
    found = collected(nn.Sequential(Calls(function), nn.Linear(4, 3)))
    assert list(found) == [f"0:{name}", "logits"]


@pytest.mark.parametrize("function", [torch.tanh, torch.sigmoid, F.hardtanh, F.logsigmoid])
def test_other_functions_are_not(function) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(
        InputError, match=r"expected ReLU-like layers \(celu, .*got a Calls of Linear; name layers, as "
    ):
        collected(Calls(function))


def test_uses_are_counted_and_values_survive_operations_in_place() -> None:
    torch.manual_seed(0)
    plain, in_place = Nested(in_place=False), Nested(in_place=True)
    in_place.load_state_dict(plain.state_dict())
    expected, found = collected(plain), collected(in_place)
    assert list(found) == ["first.1.0:relu", "act:silu", "act:silu#2", "relu", "relu#2"]  # logits: the last ReLU
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_gradients_flow_from_what_was_overwritten() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)).double()
    x = torch.randn(2, 4, dtype=torch.float64)
    found = collected(model, ["0"], x)
    (gradient,) = torch.autograd.grad(found["0"].square().sum(), model[0].weight)
    h = model[0](x)
    (expected,) = torch.autograd.grad(h.square().sum(), model[0].weight)
    assert (h < 0).any() and torch.equal(found["0"], h) and torch.allclose(gradient, expected, atol=1e-14)


def test_layers_by_name() -> None:
    torch.manual_seed(0)
    model = Nested(in_place=True)
    found = collected(model, ["second", "first.0", "logits"])
    assert list(found) == ["first.0", "second", "second#2", "logits"]
    x = torch.linspace(-2, 2, 8).view(2, 4)
    first = model.first[0](x)
    assert torch.equal(found["first.0"], first) and torch.equal(found["second"], model.second(first.relu()))


def test_a_layer_under_two_names_is_collected_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    assert list(collected(model, ["logits", "1"])) == ["1"]


def test_dropout_in_place_is_seen() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.GELU(), nn.Dropout(0.5, inplace=True), nn.Linear(64, 3))
    x = torch.randn(2, 4)
    assert torch.equal(collected(model, x=x)["1:gelu"], model[:2](x))


def test_a_change_that_could_not_be_foreseen_is_refused() -> None:
    def change(h: Tensor) -> Tensor:
        h = F.gelu(h)
        torch._foreach_add_([h], 1.0)
        return h

    with pytest.raises(InputError, match="activations that nothing changes afterwards, got gelu changed in place"):
        collected(Calls(change))


class Unused(nn.Module):
    """A layer that forward leaves out, and one that returns two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.pair = nn.Linear(4, 3), nn.Linear(4, 3), nn.LSTM(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(self.used(x).relu())[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["usde"], r"expected a layer of Unused, got 'usde'; there is used, unused"),
        (["conv7"], r"got 'conv7'; there is logits, used, unused, pair"),
        (["unused"], r"expected layers that the forward pass uses, got 'unused'; leave them out"),
        (["pair"], r"expected a tensor from the layer pair, got tuple; name layers inside of it"),
        ([], r"expected a list of names of layers, or None, got \[\]; name layers, as in layers="),
        ("used", r"expected a list of names of layers, or None, got 'used'"),
    ],
)
def test_layers_that_do_not_fit(layers, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        collected(Unused(), layers)


def test_hooks_are_gone_afterwards() -> None:
    model = Unused()
    for layers in (None, ["pair"]):
        try:
            collected(model, layers)
        except InputError:
            pass
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert not any(part._forward_hooks_always_called for part in model.modules())

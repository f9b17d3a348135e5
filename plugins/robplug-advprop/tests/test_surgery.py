"""Networks before and after surgery: nothing is lost, and what is dropped leaves no trace."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from robplug.errors import InputError
from robplug_advprop import (
    MixtureBatchNorm1d,
    MixtureBatchNorm2d,
    MixtureBatchNorm3d,
    MixtureSyncBatchNorm,
    convert,
    convert_group_norm,
    drop_auxiliary,
    route,
)


class Network(nn.Module):
    """Batch norm of several kinds, nested, and one layer that is there twice."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.BatchNorm2d(4)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), shared, nn.ReLU(), nn.Sequential(nn.Conv2d(4, 4, 1), shared))
        self.plain = nn.BatchNorm2d(4, affine=False)
        self.momentless = nn.SyncBatchNorm(4, momentum=None)
        self.stateless = nn.BatchNorm2d(4, track_running_stats=False)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.BatchNorm1d(4, eps=1e-2), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stateless(self.momentless(self.plain(self.body(x)))))


def network() -> nn.Module:
    """Returns a network whose statistics and weights are those of some training."""
    torch.manual_seed(0)
    model = Network()
    for part in model.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.affine:
            nn.init.uniform_(part.weight)
            nn.init.normal_(part.bias)
    for _ in range(3):
        model(torch.randn(8, 3, 5, 5) + 1)
    return model


X = torch.rand(6, 3, 5, 5)


@pytest.mark.parametrize("auxiliary", [1, 3])
def test_every_kind_is_converted_in_place(auxiliary: int) -> None:
    model = network()
    before = dict(model.named_parameters())
    assert convert(model.eval(), auxiliary) is model
    kinds = [model.body[1], model.plain, model.momentless, model.stateless, model.head[2]]
    expected = [MixtureBatchNorm2d, MixtureBatchNorm2d, MixtureSyncBatchNorm, MixtureBatchNorm2d, MixtureBatchNorm1d]
    assert [type(layer) for layer in kinds] == expected
    assert model.body[1] is model.body[3][1]
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert all(not part.training for part in model.modules())
    for layer in kinds:
        own = {key: value for key, value in layer.state_dict().items() if "auxiliary" not in key}
        assert len(layer.auxiliary) == auxiliary
        for part in layer.auxiliary:
            assert (part.eps, part.momentum) == (layer.eps, layer.momentum)
            found = part.state_dict()
            assert found.keys() == own.keys()
            assert all(torch.equal(found[key], own[key]) for key in own)
            shared = {p.data_ptr() for p in part.state_dict().values()} & {p.data_ptr() for p in own.values()}
            assert not shared


def test_main_keys_load_strict_into_the_plain_network_with_the_same_outputs() -> None:
    plain, model = network(), convert(network(), 2)
    for part in model.modules():
        if isinstance(part, MixtureBatchNorm2d):
            [nn.init.normal_(parameter) for aux in part.auxiliary for parameter in aux.parameters()]
    with route(model, sizes=[2, 2, 2]):
        model(torch.randn(6, 3, 5, 5))  # training moves what is main, too
    main = {key: value for key, value in model.state_dict().items() if ".auxiliary." not in key}
    fresh = Network()
    fresh.load_state_dict(main, strict=True)
    assert fresh.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(fresh.eval()(X), model.eval()(X))
    assert not torch.equal(fresh(X), plain.eval()(X))
    with route(model, "main"):
        assert torch.equal(fresh(X), model(X))


def test_dropped_it_is_a_network_never_converted() -> None:
    never, model = network(), network()
    drop_auxiliary(convert(model, 2))
    assert [type(part) for part in model.modules()] == [type(part) for part in never.modules()]
    assert model.state_dict().keys() == never.state_dict().keys()
    assert vars(model.plain).keys() == vars(never.plain).keys()
    assert torch.equal(model.eval()(X), never.eval()(X))
    pickle.loads(pickle.dumps(model))  # noqa: S301
    convert(model)  # and may be converted anew


def test_unrouted_it_trains_like_the_plain_network() -> None:
    plain, model = network().train(), convert(network().train())
    torch.testing.assert_close(model(X), plain(X), rtol=0, atol=0)
    own = {key: value for key, value in model.state_dict().items() if ".auxiliary." not in key}
    assert all(torch.equal(own[key], value) for key, value in plain.state_dict().items())


def test_hooks_and_modes_survive() -> None:
    model, seen = network().eval(), []
    model.plain.register_forward_hook(lambda *_: seen.append(1))
    convert(model)(X)
    drop_auxiliary(model)(X)
    assert len(seen) == 2 and not model.plain.training


def test_one_layer_alone_and_copies() -> None:
    layer = nn.BatchNorm3d(3).double()
    assert convert(layer) is layer and type(layer) is MixtureBatchNorm3d
    assert layer.auxiliary[0].weight.dtype == torch.float64
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301
        x = torch.rand(4, 3, 2, 2, 2).double()
        with route(other, sizes=[2, 2]):
            other(x)
        assert other.num_batches_tracked == other.auxiliary[0].num_batches_tracked == 1
    assert layer.num_batches_tracked == 0


def test_a_layer_made_by_hand_is_one_that_was_converted() -> None:
    made = MixtureBatchNorm2d(3, auxiliary=2, momentum=None, eps=1e-3)
    converted = convert(nn.BatchNorm2d(3, momentum=None, eps=1e-3), 2)
    assert made.state_dict().keys() == converted.state_dict().keys()
    assert repr(made) == repr(converted)
    assert type(drop_auxiliary(made)) is nn.BatchNorm2d
    shared = drop_auxiliary(MixtureSyncBatchNorm(3))
    assert type(shared) is nn.SyncBatchNorm and vars(shared).keys() == vars(nn.SyncBatchNorm(3)).keys()


def test_group_norm_in_every_place() -> None:
    model = network()
    weight = model.body[1].weight
    assert convert_group_norm(model, groups=2) is model
    assert isinstance(model.body[1], nn.GroupNorm) and model.body[1] is model.body[3][1]
    assert model.body[1].weight is weight and not model.plain.affine
    assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules())
    alone = torch.cat([model(x[None]) for x in X])
    torch.testing.assert_close(model(X), alone)  # no sample sees another
    layer = nn.BatchNorm2d(4)
    twice = convert_group_norm(nn.Sequential(layer, layer), groups=4)
    assert isinstance(twice[1], nn.GroupNorm) and twice[0] is twice[1]
    layer = convert_group_norm(nn.BatchNorm2d(4).eval(), groups=4)
    assert isinstance(layer, nn.GroupNorm) and not layer.training


class Own(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: convert(nn.Linear(2, 2)), "a model with batch norm, got Linear without; .*there is nothing to do"),
        (lambda: convert(nn.GroupNorm(2, 4)), "got GroupNorm without; with group or layer norm"),
        (lambda: convert(nn.BatchNorm2d(3), 0), "expected auxiliary >= 1, got 0"),
        (lambda: convert(convert(network())), "got MixtureBatchNorm2d at 'body.1'; it is converted already"),
        (lambda: convert(nn.Sequential(nn.LazyBatchNorm2d())), "got LazyBatchNorm2d at '0'; a lazy one"),
        (lambda: convert(nn.Sequential(Own(3))), "got Own at '0'"),
        (lambda: drop_auxiliary(network()), "got Network; there is nothing to drop"),
        (lambda: convert_group_norm(nn.Linear(2, 2)), "a model with batch norm, got Linear without"),
        (lambda: convert_group_norm(network(), 3), "channels in 3 equal groups, got 4 channels at 'body.1'"),
        (lambda: convert_group_norm(network(), 0), "groups >= 1, got 0"),
        (lambda: convert_group_norm(convert(network())), "got MixtureBatchNorm2d at 'body.1'; drop_auxiliary"),
        (lambda: MixtureBatchNorm1d(3, 0), "auxiliary >= 1, got 0"),
    ],
)
def test_bad_input_is_refused(call, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=words):
        call()


def test_what_is_refused_is_not_changed() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), Own(4))
    with pytest.raises(InputError):
        convert(model)
    assert type(model[0]) is nn.BatchNorm2d
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(3))
    with pytest.raises(InputError):
        convert_group_norm(model, 2)
    assert type(model[0]) is nn.BatchNorm2d


def test_a_checkpoint_of_the_other_shape_says_so() -> None:
    model = convert(network(), 2)
    for other in (network(), convert(network(), 1)):
        with pytest.raises(RuntimeError, match=r"Missing key.*plain.auxiliary.1.running_mean"):
            model.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*auxiliary"):
        network().load_state_dict(model.state_dict())
    model.load_state_dict(network().state_dict(), strict=False)
    model.load_state_dict(convert(network(), 2).state_dict())

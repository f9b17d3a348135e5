"""Which statistics a pass goes through: against plain layers fed separately."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from robplug.errors import InputError
from robplug.step import attacking
from robplug_advprop import MixtureBatchNorm1d, MixtureBatchNorm2d, convert, route


def network(auxiliary: int = 2) -> nn.Module:
    """Returns a converted network whose statistics all differ."""
    model = convert(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.BatchNorm2d(5)), auxiliary)
    for layer in (model[1], model[3]):
        for part in (layer, *layer.auxiliary):
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
            nn.init.normal_(part.running_mean)
    return model


def alone(model: nn.Module, k: int) -> nn.Module:
    """Returns the plain network with the statistics k of a converted one."""
    model = copy.deepcopy(model)
    for place in ("1", "3"):
        layer, plain = model.get_submodule(place), nn.BatchNorm2d(5)
        plain.load_state_dict((layer.auxiliary[k - 1] if k else layer).state_dict(), strict=k > 0)
        model._modules[place] = plain
    return model.train(model.training)


X = torch.rand(7, 3, 6, 6)


@pytest.mark.parametrize("k", [0, 1, 2])
def test_one_number_is_the_plain_network_with_these_statistics(k: int) -> None:
    for mode in (False, True):
        model = network().train(mode)
        plain = alone(model, k).train(mode)
        others = {key: value.clone() for key, value in model.state_dict().items()}
        with route(model, k):
            assert torch.equal(model(X), plain(X))
        moved = {key for key, value in model.state_dict().items() if not torch.equal(value, others[key])}
        start = f"auxiliary.{k - 1}." if k else ""
        names = ("running_mean", "running_var", "num_batches_tracked") if mode else ()
        assert moved == {f"{place}.{start}{name}" for place in ("1", "3") for name in names}
    with route(model, "main"):
        assert torch.equal(model.eval()(X), alone(model, 0)(X))


@pytest.mark.parametrize("sizes", [[3, 4], [2, 2, 3], [7]])
@pytest.mark.parametrize("mode", [True, False])
def test_several_sizes_are_plain_layers_fed_separately(sizes: list[int], mode: bool) -> None:
    layer = MixtureBatchNorm2d(3, auxiliary=2).train(mode)
    parts = [layer, *layer.auxiliary]
    for part in parts:
        nn.init.normal_(part.weight)
        nn.init.normal_(part.running_mean)
    plain = [nn.BatchNorm2d(3).train(mode) for _ in sizes]
    for one, part in zip(plain, parts, strict=False):
        one.load_state_dict({key: value for key, value in part.state_dict().items() if "auxiliary" not in key})
    with route(layer, sizes=sizes):
        out = layer(X)
    expected = torch.cat([one(part) for one, part in zip(plain, X.split(sizes), strict=True)])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    for one, part in zip(plain, parts, strict=False):
        for name, buffer in one.named_buffers():
            torch.testing.assert_close(part.get_buffer(name), buffer, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("length", [2, 40])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_of_50_steps_equal_those_of_plain_layers(
    momentum: float | None, length: int, dtype: torch.dtype, close: float
) -> None:
    layer = MixtureBatchNorm1d(4, auxiliary=2, momentum=momentum, dtype=dtype)
    plain = [nn.BatchNorm1d(4, momentum=momentum, dtype=dtype) for _ in range(3)]
    for step in range(50):
        x = torch.randn(9, 4, length, dtype=dtype) * (1 + step / 10) + step
        with route(layer, sizes=[2, 3, 4]):
            layer(x)
        for one, part in zip(plain, x.split([2, 3, 4]), strict=True):
            one(part)
    for one, part in zip(plain, [layer, *layer.auxiliary], strict=True):
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(getattr(part, name), getattr(one, name), rtol=close, atol=close)


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}])
def test_layers_without_weights_or_running_statistics(options: dict[str, bool]) -> None:
    layer, plain = MixtureBatchNorm2d(3, **options), [nn.BatchNorm2d(3, **options) for _ in range(2)]
    for mode in (True, False):
        with route(layer.train(mode), sizes=[3, 4]):
            out = layer(X)
        expected = torch.cat([one.train(mode)(part) for one, part in zip(plain, X.split([3, 4]), strict=True)])
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_equal_halves_with_equal_statistics_give_equal_halves() -> None:
    model = convert(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.BatchNorm2d(5)))
    for mode in (True, False):
        with route(model.train(mode), sizes=[7, 7]):
            out = model(torch.cat([X, X]))
        torch.testing.assert_close(out[:7], out[7:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("frozen", [0, 1])
def test_statistics_of_different_modes_in_one_batch(frozen: int) -> None:
    layer = MixtureBatchNorm2d(3)
    parts, cut = [layer, layer.auxiliary[0]], X.split([3, 4])
    parts[frozen].training = False  # these stay, the others go on
    with route(layer, sizes=[3, 4]):
        out = layer(X).split([3, 4])
    assert [int(part.num_batches_tracked) for part in parts] == [frozen, 1 - frozen]
    assert not parts[frozen].running_mean.any()
    torch.testing.assert_close(out[frozen], cut[frozen] / (1 + 1e-5) ** 0.5)
    torch.testing.assert_close(out[1 - frozen], nn.BatchNorm2d(3)(cut[1 - frozen]))


def test_routes_nest_and_end_with_their_block() -> None:
    model = network().eval()
    outs = [alone(model, k)(X) for k in range(3)]
    with route(model, 1):
        with route(model, sizes=[3, 4]):
            assert torch.equal(model(X)[3:], outs[1][3:])
        with pytest.raises(RuntimeError, match="boom"), route(model, 2):
            assert torch.equal(model(X), outs[2])
            raise RuntimeError("boom")
        assert torch.equal(model(X), outs[1])
        with route(model[3], "main"):  # a part of it
            mixed = model(X)
    expected = alone(model, 1)
    expected._modules["3"] = alone(model, 0)[3]
    assert torch.equal(mixed, expected(X))
    assert torch.equal(model(X), outs[0])


def test_routes_that_overlap_are_refused_and_leave_nothing_behind() -> None:
    model = network().eval()
    first, second = route(model, 1), route(model[3], 2)
    first.__enter__()
    second.__enter__()
    with pytest.raises(InputError, match="the innermost route to end first, got routes that overlap; use with"):
        first.__exit__(None, None, None)
    with pytest.raises(InputError, match="routes that overlap"):
        second.__exit__(None, None, None)
    assert torch.equal(model(X), alone(model, 0)(X))


def test_models_do_not_see_each_others_routes() -> None:
    model = network().eval()
    other = copy.deepcopy(model)
    with route(model, 1), route(other, 2):
        assert torch.equal(model(X), alone(model, 1)(X))
        assert torch.equal(other(X), alone(model, 2)(X))
        assert torch.equal(copy.deepcopy(model)(X), alone(model, 0)(X))


def test_threads_do_not_see_each_others_routes() -> None:
    model = network().eval()
    outs = [alone(model, k)(X) for k in range(3)]
    barrier, seen = threading.Barrier(3, timeout=20), {}

    def run(k: int) -> None:
        with route(model, k):
            barrier.wait()
            seen[k] = model(X)
            barrier.wait()

    threads = [threading.Thread(target=run, args=(k,)) for k in (1, 2)]
    for thread in threads:
        thread.start()
    barrier.wait()
    here = model(X)
    barrier.wait()
    for thread in threads:
        thread.join()
    assert torch.equal(here, outs[0]) and all(torch.equal(seen[k], outs[k]) for k in (1, 2))


def test_an_attack_leaves_every_buffer_as_it_was() -> None:
    model = network().train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with route(model, 1), attacking(model):
        out = model(X)
    assert torch.equal(out, alone(model, 1).eval()(X))
    with route(model, sizes=[3, 4]), attacking(model, "train"):
        model(X)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(part.training for part in model.modules())


def test_gradients_reach_the_statistics_that_were_used_and_no_others() -> None:
    model = network()
    with route(model, sizes=[3, 4]):
        model(X).square().sum().backward()
    layer = model[3]
    used = (layer.weight, layer.auxiliary[0].weight)
    assert layer.auxiliary[1].weight.grad is None
    for k, (weight, part) in enumerate(zip(used, X.split([3, 4]), strict=True)):
        plain = alone(model, k)
        (gradient,) = torch.autograd.grad(plain(part).square().sum(), plain[3].weight)
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_autocast_and_channels_last(dtype: torch.dtype) -> None:
    layer = MixtureBatchNorm2d(3).to(dtype)
    x = X.to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    with route(layer, sizes=[3, 4]):
        out = layer(x)
        out.float().square().sum().backward()
    assert out.dtype == x.grad.dtype == layer.running_mean.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    single = MixtureBatchNorm2d(3)
    with route(single, sizes=[3, 4]):
        torch.testing.assert_close(out.float(), single(X), rtol=0.05, atol=0.05)
    model = network()
    with torch.autocast("cpu", torch.bfloat16), route(model, sizes=[3, 4]):
        assert model(X).dtype == torch.bfloat16
    assert model[1].running_mean.dtype == torch.float32


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiled_without_a_graph_break(fresh_compiler: None) -> None:
    """The compiler must notice each change of the route, and compile each fixed split once."""
    model, graphs = network(), []

    def backend(graph, inputs):  # type: ignore[no-untyped-def]
        graphs.append(graph)
        return graph.forward

    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(X), plain(X))
    for _ in range(2):
        for options in ({"which": 1}, {"sizes": [3, 4]}, {"which": 2}, {"which": "main"}):
            with route(model, **options), route(plain, **options):
                torch.testing.assert_close(compiled(X), plain(X), msg=str(options))
        torch.testing.assert_close(compiled(X), plain(X))
    assert len(graphs) <= 5
    for (name, one), (_, other) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "a route by number or by sizes, got which=None and sizes=None"),
        ({"which": 1, "sizes": [3, 4]}, "got which=1 and sizes=.*give one of the two"),
        ({"which": 3}, '"main" or a number from 0 to 2, got 3'),
        ({"which": -1}, "from 0 to 2, got -1"),
        ({"which": "aux"}, "from 0 to 2, got 'aux'"),
        ({"which": True}, "from 0 to 2, got True"),
        ({"sizes": [7, 0]}, r"parts of at least one sample, got sizes=\[7, 0\]; .*route\(model, 1\)"),
        ({"sizes": []}, r"1 to 3 sizes, main and 2 auxiliary, got \[\]"),
        ({"sizes": [1, 1, 1, 4]}, r"1 to 3 sizes.* got \[1, 1, 1, 4\]"),
    ],
)
def test_routes_that_make_no_sense(options: dict, words: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(InputError, match=words), route(network(), **options):
        pass


def test_a_model_without_statistics_and_a_batch_of_another_size() -> None:
    with pytest.raises(InputError, match=r"mixture batch norm, got Linear; convert\(model"), route(nn.Linear(2, 2), 1):
        pass
    for mode in (True, False):
        model = network().train(mode)
        with route(model, sizes=[3, 3]), pytest.raises(InputError, match=r"batch of 6 samples.*got 7; give the sizes"):
            model(X)


def test_a_batch_of_one_in_training() -> None:
    layer = MixtureBatchNorm1d(3)
    before = copy.deepcopy(layer.state_dict())
    with (
        route(layer, sizes=[1, 4]),
        pytest.raises(ValueError, match=r"at least 2 values.*got sizes \[1, 4\].*drop_last"),
    ):
        layer(torch.rand(5, 3))
    with route(layer, 1), pytest.raises(ValueError, match="more than 1 value per channel when training"):
        layer(torch.rand(1, 3))
    with route(layer.eval(), sizes=[1, 4]):
        layer(torch.rand(5, 3))
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items() if "running" in key)

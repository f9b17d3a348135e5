"""The kernels against their definitions and closed forms, their derivatives, and what they refuse."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robplug.testing.kernels import check_refused, laid_out
from robplug_nsloss.kernels import ops, reference
from robplug_nsloss.kernels.ops import accumulate_signs, mean_abs_difference, sphere_noise
from robplug_nsloss.kernels.surrogate import sign_surrogate

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHAPES = ((4, 3, 5, 7), (4, 11), (4, 2, 3), (1,))
OPERATORS = torch.ops.robplug_nsloss
X = torch.randn(2, 3, 4, 5)
SIGNS = torch.zeros(2, 3, 4, 5, dtype=torch.int8)


def layers(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    """Returns activations of two passes; behind a ReLU, many of them are equal."""
    clean = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    noisy = [layer + torch.randn(layer.shape, dtype=torch.float64) for layer in clean]
    return [layer.relu().to(dtype) for layer in clean], [layer.relu().to(dtype) for layer in noisy]


def plain_differences(clean: list[Tensor], noisy: list[Tensor]) -> Tensor:
    """The definition, one mean a layer."""
    return torch.stack([(other - one).abs().mean() for one, other in zip(clean, noisy, strict=True)])


@pytest.mark.parametrize("shape", [(3, 2, 4, 5), (5, 7), (1, 3, 9)])
def test_noise_lies_on_the_sphere_in_the_direction_of_the_draws(shape: tuple[int, ...]) -> None:
    x, noise = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    moved = sphere_noise(x, noise, 0.3) - x
    torch.testing.assert_close(moved.flatten(1).norm(dim=1), torch.full(shape[:1], 0.3).double())
    cosine = nn.functional.cosine_similarity(moved.flatten(1), noise.flatten(1))
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


def test_noise_is_even_on_the_sphere() -> None:
    """In d dimensions each coordinate has mean 0 and variance r^2 / d; five standard errors."""
    draws, d = 20_000, 6
    moved = sphere_noise(torch.zeros(draws, d).double(), torch.randn(draws, d).double(), 2.0)
    assert (moved.mean(0).abs() < 5 * math.sqrt(4 / d / draws)).all()
    fourth = 3 * 16 / (d * (d + 2))
    assert ((moved.square().mean(0) - 4 / d).abs() < 5 * math.sqrt((fourth - 16 / d**2) / draws)).all()


def test_nsloss_of_a_linear_layer_is_its_closed_form() -> None:
    """mean |w_j| Γ(d/2) / (√π Γ((d+1)/2)), the mean of |<w, u>| over the sphere, at every radius."""
    d, draws = 5, 20_000
    w = torch.randn(3, d).double()
    x = torch.randn(1, d).double().expand(draws, d)
    mean = w.norm(dim=1).mean() * math.gamma(d / 2) / (math.sqrt(math.pi) * math.gamma((d + 1) / 2))
    for radius in (0.01, 3.0):
        noisy = sphere_noise(x, torch.randn(draws, d).double(), radius)
        torch.testing.assert_close(mean_abs_difference([x @ w.T], [noisy @ w.T]) / radius, mean, rtol=0.02, atol=0)


def test_a_sample_without_noise_stays_where_it_is() -> None:
    noise = torch.randn_like(X)
    noise[1] = 0
    out = sphere_noise(X, noise, 0.5)
    assert torch.equal(out[1], X[1]) and not torch.equal(out[0], X[0])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "gaps", "transposed"])
def test_strides_and_dtypes_of_noise(poisoned: None, dtype: torch.dtype, layout: str) -> None:
    """The float64 result, rounded once; the norm of 60 halves does not overflow."""
    x, noise = laid_out(X.to(dtype), layout), 100 * torch.randn_like(X)
    out = sphere_noise(x, noise.to(dtype), 300.0)
    truth = x.double() + 300 * noise.to(dtype).double() / noise.to(dtype).double().flatten(1).norm(dim=1).view(
        -1, 1, 1, 1
    )
    close = max(torch.finfo(dtype).eps, 1e-12)
    torch.testing.assert_close(out.double(), truth, rtol=close, atol=close)
    assert (out.dtype, out.stride()) == (dtype, torch.empty_like(x).stride())


def test_differences_are_their_definition() -> None:
    clean, noisy = layers()
    expected = plain_differences(clean, noisy)
    torch.testing.assert_close(mean_abs_difference(clean, noisy), expected.sum(), rtol=1e-14, atol=0)
    sums = [torch.empty_like(layer, dtype=torch.int8).fill_(77) for layer in clean]
    for draw in range(3):
        means = accumulate_signs(clean, noisy, sums, draw)
        torch.testing.assert_close(means, expected, rtol=1e-14, atol=0)
        for one, other, total in zip(clean, noisy, sums, strict=True):
            assert torch.equal(total, (draw + 1) * torch.sign(other - one).to(torch.int8))


def test_layers_worked_on_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    clean, noisy = layers()
    g = torch.tensor(0.7)

    def run() -> list[Tensor]:
        sums = [torch.empty_like(layer, dtype=torch.int8) for layer in clean]
        means, signs = reference.accumulate_signs(clean, noisy, sums, 0)
        grads = reference.mean_abs_difference_backward(g, clean, noisy, True)
        return [means, *signs, *sums, *grads, reference.add_signs(clean[0], signs[0], g)]

    whole = run()
    monkeypatch.setattr(reference, "CHUNK", 16)
    for one, other in zip(run(), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    """At most twice as far from the truth as plain torch in that precision, and the signs are exact."""
    clean, noisy = layers(dtype)
    truth = plain_differences([layer.double() for layer in clean], [layer.double() for layer in noisy])
    sums = [torch.empty_like(layer, dtype=torch.int8) for layer in clean]
    means = accumulate_signs(clean, noisy, sums, 0)
    assert means.dtype == torch.float32
    off, plain = (means - truth).abs(), (plain_differences(clean, noisy).double() - truth).abs()
    assert (off <= torch.maximum(2 * plain, 4e-7 * truth)).all()
    for one, other, total in zip(clean, noisy, sums, strict=True):
        assert torch.equal(total, torch.sign(other.double() - one.double()).to(torch.int8))


@pytest.mark.parametrize("layout", ["channels_last", "gaps", "transposed"])
def test_strides_of_layers_do_not_matter(poisoned: None, layout: str) -> None:
    clean, noisy = laid_out(X, layout), torch.randn_like(X)
    for one, other in ((clean, noisy), (noisy, clean), (clean, laid_out(noisy, layout))):
        sums = laid_out(SIGNS.double(), "contiguous").to(torch.int8).mT.contiguous().mT
        leaf = other.detach().requires_grad_()
        means = accumulate_signs([one], [leaf], [sums], 0)
        torch.testing.assert_close(means[0], (other - one).abs().mean())
        assert torch.equal(sums, torch.sign(other - one).to(torch.int8))
        (slope,) = torch.autograd.grad(mean_abs_difference([one], [leaf]) + means.sum(), leaf)
        torch.testing.assert_close(slope, 2 * torch.sign(other - one) / X.numel())


def test_the_gradient_at_equal_values_is_zero() -> None:
    clean, noisy = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 5.0, 0.0, 4.0]).requires_grad_()
    sums = torch.empty(4, dtype=torch.int8)
    for value in (mean_abs_difference([clean], [noisy]), accumulate_signs([clean], [noisy], [sums], 0).sum()):
        assert torch.autograd.grad(value, noisy)[0].tolist() == [0, 0.25, -0.25, 0]


def test_a_nan_shows_in_the_mean_of_its_layer_alone() -> None:
    clean, noisy = layers()
    noisy[1][2, 3] = torch.nan
    sums = [torch.empty_like(layer, dtype=torch.int8) for layer in clean]
    assert accumulate_signs(clean, noisy, sums, 0).isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("call", [sphere_noise, lambda *args: OPERATORS.sphere_noise(*args)])
def test_noise_is_differentiated_as_the_identity(call: Callable[..., Tensor]) -> None:
    x, noise = torch.randn(2, 3, 2).double().requires_grad_(), torch.randn(2, 3, 2).double()
    assert torch.autograd.gradcheck(lambda x: call(x, noise, 0.3), (x,))
    assert torch.autograd.gradgradcheck(lambda x: call(x, noise, 0.3).square(), (x,))


def test_gradients_of_differences() -> None:
    """Away from equal values; in both lists, in one, and with an upstream gradient for each layer."""
    clean = [torch.randn(shape).double().requires_grad_() for shape in ((2, 3), (2, 2, 2))]
    noisy = [(layer + torch.randn(layer.shape).sign()).detach().requires_grad_() for layer in clean]
    assert torch.autograd.gradcheck(lambda a, b, c, d: mean_abs_difference([a, b], [c, d]), (*clean, *noisy))
    assert torch.autograd.gradcheck(lambda a, b: mean_abs_difference([a, b], noisy), clean)
    assert torch.autograd.gradcheck(lambda c, d: mean_abs_difference(clean, [c, d]), noisy)
    sums = [torch.empty_like(layer, dtype=torch.int8) for layer in clean]
    assert torch.autograd.gradcheck(lambda c, d: accumulate_signs(clean, [c, d], sums, 0), noisy)


def test_differences_differentiate_once() -> None:
    x = X.clone().requires_grad_()
    noisy = [x * x, x * x * 3]
    sums = [SIGNS.clone(), SIGNS.clone()]
    for value in (mean_abs_difference([X, X], noisy), accumulate_signs([X, X], noisy, sums, 0).sum()):
        (slope,) = torch.autograd.grad(value.square(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"no autograd formula|once_differentiable"):
            slope.sum().backward()
    inner = x * x
    means = accumulate_signs([X, X], [inner, inner * x], sums, 0)
    with pytest.raises(RuntimeError, match="differentiated once, got create_graph=True"):
        torch.autograd.grad(means.sum(), x, create_graph=True)


class Branching(nn.Module):
    """Layers behind one another, a sum that shares a gradient, a layer that leads nowhere, one of two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.ModuleList(nn.Linear(5, 5) for _ in range(4))

    def activations(self, x: Tensor) -> list[Tensor]:
        first, second, third, last = self.linear
        a = first(x).relu()
        b = (second(a) + a).relu()
        dead = third(b).relu()
        half, other_half = b.split([2, 3], dim=1)
        return [a, b, dead, other_half, last(torch.cat([half * 2, b[:, 2:] + a[:, 2:]], dim=1))]


def test_sums_of_signs_under_vmap() -> None:
    clean, noisy, sums = (*torch.randn(2, 3, 4, 5).double().unbind(), torch.zeros(3, 4, 5, dtype=torch.int8))
    means = torch.vmap(lambda *layer: accumulate_signs(*([each] for each in layer), 0))(clean, noisy, sums)
    torch.testing.assert_close(means[:, 0], (noisy - clean).abs().mean((1, 2)))
    assert torch.equal(sums, (noisy - clean).sign().to(torch.int8))


def test_draw_by_draw_gives_the_gradient_of_all_draws_at_once() -> None:
    model, x = Branching().double(), torch.randn(7, 5).double()
    weights = torch.rand(5).double()
    draws = [torch.randn_like(x) for _ in range(4)]
    clean = model.activations(x)
    each = [plain_differences(clean, model.activations(sphere_noise(x, noise, 0.5))) for noise in draws]
    expected = torch.autograd.grad((torch.stack(each) @ weights).sum(), list(model.parameters()))
    clean = model.activations(x)
    sums = [torch.empty_like(layer, dtype=torch.int8) for layer in clean]
    for draw, noise in enumerate(draws):
        means = accumulate_signs(clean, model.activations(sphere_noise(x, noise, 0.5)), sums, draw)
        torch.testing.assert_close(means, each[draw], rtol=1e-14, atol=0)
        (means @ weights).backward()
    (-sign_surrogate(clean, sums) @ weights).backward()
    for parameter, slope in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, slope, rtol=0, atol=1e-14)


def test_gradients_of_activations_between_are_whole() -> None:
    """An inner layer's gradient, asked for by name or retained, has its own part and the part from behind."""
    model, x = Branching().double(), torch.randn(3, 5).double()
    clean, noisy = model.activations(x + 0.1), model.activations(x)
    expected = torch.autograd.grad(plain_differences(clean, noisy).sum(), noisy[:2], retain_graph=True)
    means = accumulate_signs(clean, noisy, [torch.empty_like(layer, dtype=torch.int8) for layer in clean], 0)
    for layer, slope in zip(noisy, expected, strict=False):
        torch.testing.assert_close(*torch.autograd.grad(means.sum(), layer, retain_graph=True), slope)
        layer.retain_grad()
    means.sum().backward()
    torch.testing.assert_close([layer.grad for layer in noisy[:2]], list(expected), rtol=0, atol=1e-14)


def test_a_gradient_shared_with_another_branch_is_not_written_on() -> None:
    x, other = torch.randn(4).double().requires_grad_(), torch.randn(4).double().requires_grad_()
    inner = x * 1
    value = inner + other
    clean = [torch.zeros(4).double(), torch.zeros(4).double()]
    accumulate_signs(clean, [inner, value], [SIGNS.new_empty(4) for _ in range(2)], 0).sum().backward()
    torch.testing.assert_close(other.grad, value.detach().sign() / 4)
    torch.testing.assert_close(x.grad, (value.detach().sign() + inner.detach().sign()) / 4)


def test_one_layers_gradient_at_a_time() -> None:
    """Nothing is kept for the gradient but int8 signs, and the graph is freed without the garbage collector."""
    model, x = Branching(), torch.randn(3, 5)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    clean, noisy = model.activations(x + 0.1), model.activations(x)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        means = accumulate_signs(clean, noisy, [torch.empty_like(layer, dtype=torch.int8) for layer in clean], 0)
        assert {tensor.dtype for tensor in kept} == {torch.int8}
        kept.clear()
        mean_abs_difference(clean, noisy)
        assert {id(tensor) for tensor in kept} <= {id(tensor) for tensor in (*clean, *noisy)}
    kept.clear()
    gone = weakref.ref(noisy[0])
    gc.disable()
    try:
        means.sum().backward()
        del noisy, means
        assert gone() is None
    finally:
        gc.enable()


def test_a_gradient_that_never_arrives_is_an_error(nothing: Callable[[Tensor], Tensor]) -> None:
    inner = X.clone().requires_grad_() * 2
    outer = nothing(inner)
    means = accumulate_signs([X, X], [inner, outer], [SIGNS.clone(), SIGNS.clone()], 0)
    with pytest.raises(RuntimeError, match=r"expected a gradient for layer 0 .* got None; .*return zeros there"):
        means.sum().backward()


def test_constants_and_leaves_among_the_layers() -> None:
    """A node made of a constant has an edge to nothing, and so has a layer that was not computed."""
    constant, leaf = torch.randn(2, 3), torch.randn(2, 3, requires_grad=True)
    weight = torch.randn(2, 3, requires_grad=True)
    layers = [constant, leaf, weight * constant]
    signs = [torch.ones(2, 3, dtype=torch.int8) for _ in layers]
    by_leaf, by_weight = torch.autograd.grad(sign_surrogate(layers, signs).sum(), [leaf, weight])
    assert torch.allclose(by_leaf, torch.full((2, 3), 1 / 6)) and torch.allclose(by_weight, constant / 6)


def test_without_gradients_nothing_is_kept() -> None:
    noisy = X.clone().requires_grad_()
    with torch.no_grad():
        assert not accumulate_signs([X], [noisy], [SIGNS.clone()], 0).requires_grad
    assert not accumulate_signs([noisy], [X], [SIGNS.clone()], 0).requires_grad


def test_an_int8_holds_the_most_draws() -> None:
    sums = SIGNS.clone()
    for draw in range(127):
        accumulate_signs([X], [X + 1], [sums], draw)
    assert (sums == 127).all()
    with pytest.raises(ValueError, match=r"0 <= draw < 127, got 127; .*take fewer"):
        accumulate_signs([X], [X + 1], [sums], 127)
    assert (sums == 127).all()


def test_what_is_called_is_the_operator_bit_for_bit() -> None:
    clean, noisy = layers(torch.bfloat16)
    found, expected = ([torch.empty_like(layer, dtype=torch.int8) for layer in clean] for _ in range(2))
    assert torch.equal(sphere_noise(X, X + 1, 0.3), OPERATORS.sphere_noise(X, X + 1, 0.3))
    for draw in range(2):
        means, _ = OPERATORS.accumulate_signs(clean, noisy, expected, draw)
        assert torch.equal(accumulate_signs(clean, noisy, found, draw), means)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_opcheck() -> None:
    utils = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    x, last = X.clone().requires_grad_(), X.to(memory_format=torch.channels_last).requires_grad_()
    gaps, weight = laid_out(X, "gaps"), torch.tensor(0.3)
    torch.library.opcheck(ops._sphere_noise, (last, gaps, 0.3), test_utils=utils)
    torch.library.opcheck(ops._mean_abs_difference, ([x, last], [last, x]), test_utils=utils)
    torch.library.opcheck(
        ops._mean_abs_difference_backward, (weight, [X, X], [X + 1, gaps], True), test_utils=utils[::2]
    )
    sums = [SIGNS.clone(), SIGNS.mT.contiguous().mT]
    torch.library.opcheck(ops._accumulate_signs, ([X, X], [X + 1, gaps], sums, 1), test_utils=utils[::2])
    torch.library.opcheck(ops._add_signs, (gaps, SIGNS, weight), test_utils=utils[::2])


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: sphere_noise(X.long(), X, 1.0), TypeError, r"x of .*got torch.int64; .*x.float\(\)"),
        (lambda: sphere_noise(X, X.long(), 1.0), TypeError, "noise of .*got torch.int64"),
        (lambda: sphere_noise(X[0, 0, 0], X[0, 0, 0], 1.0), ValueError, r"\(N, ...\), got \(5,\); give a batch"),
        (lambda: sphere_noise(X, X[:1], 1.0), ValueError, r"\(2, 3, 4, 5\) .*got \(1, 3, 4, 5\).*randn_like"),
        (lambda: sphere_noise(X, X.clone().requires_grad_(), 1.0), ValueError, r"noise.detach\(\)"),
        (lambda: sphere_noise(X, X, 0.0), ValueError, "radius > 0, got 0.0"),
        (lambda: sphere_noise(X, X, -1.0), ValueError, "got -1.0"),
        (lambda: sphere_noise(X, X, math.nan), ValueError, "finite radius > 0, got nan"),
        (lambda: mean_abs_difference([], []), ValueError, "got 0 clean and 0 noisy"),
        (lambda: mean_abs_difference([X], [X, X]), ValueError, "got 1 clean and 2 noisy"),
        (lambda: mean_abs_difference([X, X.long()], [X, X.long()]), TypeError, r"clean\[1\] of .*torch.int64"),
        (lambda: mean_abs_difference([X], [X.double()]), ValueError, r"noisy\[0\] .*float32.*got .*float64"),
        (lambda: mean_abs_difference([X, X], [X, X[:1]]), ValueError, r"noisy\[1\] \(2, 3, 4, 5\).*\(1, 3, 4, 5\)"),
        (lambda: mean_abs_difference([X[:0]], [X[:0]]), ValueError, r"with values, got shape \(0, 3, 4, 5\)"),
        (lambda: accumulate_signs([X], [X], [], 0), ValueError, "a sum for each of 1 layers, got 0"),
        (lambda: accumulate_signs([X], [X], [X], 0), ValueError, "of torch.int8 .*got .*float32.*empty_like"),
        (lambda: accumulate_signs([X], [X], [SIGNS], -1), ValueError, "0 <= draw < 127, got -1"),
        (lambda: sign_surrogate([X], []), ValueError, "got 0 for 1 layers"),
        (lambda: sign_surrogate([X], [SIGNS[:1]]), ValueError, r"signs\[0\] \(2, 3, 4, 5\) .*got \(1, 3, 4, 5\)"),
    ],
)
def test_bad_input_is_refused_with_value_and_remedy(call: Any, kind: type[Exception], words: str) -> None:
    check_refused(call, kind, words)

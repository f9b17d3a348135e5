"""The kernels for the CPU against the reference, and a loss that is made of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from robplug_nsloss import ns_loss
from robplug_nsloss.activations import passes_of
from robplug_nsloss.kernels import calls, numba_impl, reference
from robplug_nsloss.kernels.surrogate import _ReLU

SHAPES = [(1,), (3, 5), (2, 3, 7, 5), (numba_impl.BLOCK,), (3, numba_impl.BLOCK + 1), (70, 31, 33)]
LAST = torch.channels_last


def layer(shape: tuple[int, ...], last: bool) -> tuple[Tensor, Tensor]:
    """Returns a layer's activations of two passes; behind a ReLU, many of them are equal."""
    clean = torch.randn(shape)
    noisy = (clean + torch.randn(shape)).relu()
    return tuple(x.contiguous(memory_format=LAST) if last else x for x in (clean.relu(), noisy))  # type: ignore[return-value]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("shape", "last"), [*((shape, False) for shape in SHAPES), ((2, 3, 7, 5), True)])
def test_signs_sums_and_means_are_those_of_the_reference(
    poisoned: None, shape: tuple[int, ...], last: bool, threads: int
) -> None:
    torch.set_num_threads(threads)
    try:
        ours, theirs = (torch.empty_like(layer(shape, last)[0], dtype=torch.int8).fill_(7) for _ in range(2))
        for draw in range(3):
            clean, noisy = layer(shape, last)
            parts, signs = numba_impl.accumulate_signs(clean, noisy, ours, draw)
            _, expected_signs = reference.accumulate_one(clean, noisy, theirs, draw)
            assert torch.equal(signs, expected_signs) and torch.equal(ours, theirs)
            assert signs.stride() == expected_signs.stride()
            assert math.isclose(parts.double().sum(), (noisy.double() - clean.double()).abs().mean(), rel_tol=4e-7)
            weight = torch.tensor(0.7)
            added = numba_impl.add_signs(noisy, signs, weight)
            assert added.stride() == noisy.stride()
            torch.testing.assert_close(added, reference.add_signs(noisy, signs, weight), rtol=2e-7, atol=1e-7)
            passed = numba_impl.relu_add_signs(noisy, signs, weight, clean)
            assert passed.stride() == noisy.stride() and torch.equal(passed, added * (clean > 0))
            expected = reference.relu_add_signs(noisy, signs, weight, clean)
            assert passed.stride() == expected.stride()
            torch.testing.assert_close(passed, expected, rtol=2e-7, atol=1e-7)
    finally:
        torch.set_num_threads(1)


def test_the_sum_does_not_depend_on_the_number_of_threads() -> None:
    clean, noisy = layer((70, 31, 33), False)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(numba_impl.accumulate_signs(clean, noisy, torch.zeros_like(clean, dtype=torch.int8), 0)[0])
    torch.set_num_threads(1)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_sums_reach_as_far_as_an_int8() -> None:
    clean, noisy = torch.zeros(100), torch.tensor([1.0, -1.0] * 50)
    sums = torch.empty(100, dtype=torch.int8)
    for draw in range(127):
        numba_impl.accumulate_signs(clean, noisy, sums, draw)
    assert torch.equal(sums, (127 * noisy).to(torch.int8))


def test_nan_and_infinity_show_in_the_mean() -> None:
    for value in (math.nan, math.inf):
        noisy = torch.zeros(9000)
        noisy[4999] = value
        parts, _ = numba_impl.accumulate_signs(torch.zeros(9000), noisy, torch.zeros(9000, dtype=torch.int8), 0)
        assert float(parts.sum()) == value or math.isnan(parts.sum())


def test_what_lies_otherwise_is_left_to_the_reference() -> None:
    x, signs = torch.randn(4, 6), torch.zeros(4, 6, dtype=torch.int8)
    assert calls.is_native(x, signs)
    for other in (x.double(), x.half(), x.mT.contiguous().mT, x[:1].expand(4, 6)):
        assert not calls.is_native(other, signs)
    clean, noisy = layer((2, 3, 7, 5), False)
    total = torch.empty_like(clean, dtype=torch.int8)
    parts, found = calls.parts_and_signs(clean.contiguous(memory_format=LAST), noisy, total, 0)
    assert torch.equal(found, total) and torch.equal(total, (noisy - clean).sign().to(torch.int8))
    torch.testing.assert_close(parts.sum(), (noisy - clean).abs().mean())


def test_the_loss_in_single_precision_is_that_in_double(precisions: Callable[[nn.Module], list[str]]) -> None:
    calls = precisions(
        nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))
    )
    assert calls.count("accumulate_signs") == 3 * 3  # layers, draws
    assert calls.count("relu_add_signs") == 2 * 3 and calls.count("add_signs") == 3 + 3  # the latter in the clean pass


class Aside(nn.Module):
    """A ReLU that leads nowhere, and one whose result is used twice; or is the logits, too."""

    def __init__(self, is_last: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 5)
        self.is_last = is_last

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        torch.relu(self.b(x))
        return h if self.is_last else self.c(h + h.sin())  # type: ignore[no-any-return]


@pytest.mark.parametrize("is_last", [False, True])
def test_every_relu_gets_all_its_parts_once(monkeypatch: pytest.MonkeyPatch, is_last: bool) -> None:
    model, x, found = Aside(is_last), torch.rand(64, 6), []
    noise = torch.randn(x.shape, dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        exact = model.to(dtype)
        monkeypatch.setattr(torch, "randn", lambda *_, dtype=dtype, **__: noise.to(dtype))
        loss = ns_loss(exact, x.to(dtype), radius=0.5, draws=1)
        found.append(
            torch.autograd.grad(loss, [exact.a.weight, exact.b.weight, *([] if is_last else [exact.c.weight])])
        )
        model = model.to(torch.float32)
    for single, double in zip(*found, strict=True):
        torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-4)
    assert all(float(weight.abs().max()) > 0 for weight in found[0])


def test_a_pass_of_one_s_own_can_be_differentiated_twice() -> None:
    model, x, found = Aside(), torch.rand(8, 6, requires_grad=True), []
    for own in (True, False):
        with passes_of(model, None) as one_pass, one_pass(own=own) as recorder:
            out = model(x)
        nodes = {type(activation.grad_fn) for activation in recorder.tensors}
        assert (_ReLU._backward_cls in nodes) is own  # type: ignore[attr-defined]
        (slope,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), [model.a.weight, model.c.weight]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_default_dtype_and_device_change_nothing() -> None:
    clean, noisy = layer((70, 31, 33), False)
    sums = torch.zeros_like(clean, dtype=torch.int8)
    expected = numba_impl.accumulate_signs(clean, noisy, sums, 0)
    for dtype, device in ((torch.float64, "cpu"), (torch.bfloat16, "cpu"), (torch.float32, "meta")):
        try:
            torch.set_default_dtype(dtype)
            torch.set_default_device(device)
            found = numba_impl.accumulate_signs(clean, noisy, sums, 0)
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_what_is_wrong_is_refused_before_a_kernel_sees_it() -> None:
    clean, sums = torch.zeros(4), torch.zeros(4, dtype=torch.int8)
    for wrong in (clean.bfloat16(), torch.zeros(5), clean.double()):
        with pytest.raises(ValueError, match="compare the same layer of two passes"):
            calls.parts_and_signs(wrong, clean, sums, 0)
    with pytest.raises(ValueError, match="leave the layer out"):
        calls.parts_and_signs(clean[:0], clean[:0], sums[:0], 0)
    with pytest.raises(ValueError, match="got 127"):
        calls.parts_and_signs(clean, clean, sums, 127)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert calls.parts_and_signs(clean, clean, sums, 0)[1].shape == (4,)


def test_a_compiled_model_has_the_same_loss_in_the_dtype_of_its_activations() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3), nn.Tanh())
    x, found = torch.rand(5, 6), []
    for one, names in ((model, ["0", "2"]), (torch.compile(model, backend="eager"), ["_orig_mod.0", "_orig_mod.2"])):
        found.append(ns_loss(one, x, draws=2, layers=names, generator=torch.Generator().manual_seed(3)))
    torch.testing.assert_close(found[1], found[0])
    assert found[0].dtype == torch.float32

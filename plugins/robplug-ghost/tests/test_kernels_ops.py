"""The erosions against their definitions and Philox' published answers, their derivatives, and what they refuse."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from robplug.testing.kernels import check_refused
from robplug_ghost import erode_add, erode_dropout, erode_scale
from robplug_ghost.kernels import ops, reference

SEED = 2**62 + 12345
MASK = 0xFFFFFFFF
X = torch.randn(2, 3, 4, 5)
CPU = torch.device("cpu")


def philox_by_hand(key: tuple[int, int], counter: tuple[int, ...]) -> list[int]:
    """Philox4x32-10 as it is printed in Salmon et al. 2011, section 3.3 and table 2, one number at a time."""
    (k0, k1), (x0, x1, x2, x3) = key, counter
    for _ in range(10):
        first, second = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = (second >> 32) ^ x1 ^ k0, second & MASK, (first >> 32) ^ x3 ^ k1, first & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return [x0, x1, x2, x3]


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [
        ((0, 0), (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((MASK, MASK), (MASK,) * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers(key: tuple[int, int], counter: tuple[int, ...], words: str) -> None:
    """Those that the authors publish with their library Random123."""
    expected = [int(word, 16) for word in words.split()]
    seed = key[0] | key[1] << 32
    assert reference.philox(seed, counter) == expected
    assert [word.item() for word in reference.philox(seed, [torch.tensor([word]) for word in counter])] == expected
    assert philox_by_hand(key, counter) == expected


def weights_by_hand(layer: int, channels: int, skip: float) -> Tensor:
    words = [philox_by_hand((SEED & MASK, SEED >> 32), (c // 4, 0, layer, 0))[c % 4] for c in range(channels)]
    return torch.tensor([1 - skip + 2 * skip * ((word >> 8) + 0.5) / 2**24 for word in words], dtype=torch.float64)


def mask_by_hand(layer: int, channels: int, positions: int, keep: float) -> Tensor:
    key = (SEED & MASK, SEED >> 32)
    rows = [
        [philox_by_hand(key, (p // 4, c, layer, 1))[p % 4] >> 8 < keep * 2**24 for p in range(positions)]
        for c in range(channels)
    ]
    return torch.tensor(rows)


@pytest.mark.parametrize("layer", [0, 5, 16, 2**31 - 1])
def test_skip_erosion_is_its_definition(layer: int) -> None:
    shortcut, residual = (torch.randn(2, 3, 4, 5, dtype=torch.float64) for _ in range(2))
    w = weights_by_hand(layer, 3, 0.22)[:, None, None]
    close = {"rtol": 1e-7, "atol": 1e-7}
    torch.testing.assert_close(erode_add(shortcut, residual, SEED, layer, 0.22), w * shortcut + residual, **close)
    out = erode_add(shortcut, residual, SEED, layer, 0.22, "relu")
    torch.testing.assert_close(out, (w * shortcut + residual).relu(), **close)
    torch.testing.assert_close(erode_scale(shortcut, SEED, layer, 0.22), w * shortcut, **close)


@pytest.mark.parametrize("counters", [64, reference.CHUNK + 64])
def test_masks_of_large_layers_are_their_definition(counters: int) -> None:
    """On both sides of the sizes from which on threads share the work, and from which on it is done in parts."""
    channels, positions = counters // 64, 4 * 64
    mask = reference.kept(SEED, 5, channels, positions, 0.7, CPU)
    for channel in (0, channels // 2, channels - 1):
        for position in (0, 1, positions - 2, positions - 1):
            word = philox_by_hand((SEED & MASK, SEED >> 32), (position // 4, channel, 5, 1))[position % 4]
            assert mask[channel, position] == (word >> 8 < 0.7 * 2**24)


@pytest.mark.parametrize("shape", [(2, 3, 2, 5), (2, 3, 7), (4, 3), (1, 2, 3, 2, 2)])
def test_dropout_erosion_is_its_definition(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    mask = mask_by_hand(5, shape[1], math.prod(shape[2:]), 0.7).view(shape[1:])
    torch.testing.assert_close(erode_dropout(x, SEED, 5, 0.7), x * mask / 0.7, rtol=1e-14, atol=0)


def test_weights_are_uniform_and_independent() -> None:
    """Over 2**16 draws mean and variance of U[1 - s, 1 + s] lie within five standard errors."""
    w = torch.cat([reference.channel_weights(seed, 0, 4096, 0.5).double() for seed in range(16)])
    assert 0.5 <= w.min() < 0.501 and 1.499 < w.max() <= 1.5
    assert abs(w.mean() - 1) < 5 * math.sqrt(0.25 / 3 / len(w))
    assert abs(w.var() - 0.25 / 3) < 5 * 0.25 * math.sqrt(4 / 45 / len(w))
    drawn = torch.stack([reference.channel_weights(seed, layer, 512, 0.5) for seed in (1, 2) for layer in range(20)])
    off = torch.corrcoef(drawn.double()) - torch.eye(40, dtype=torch.float64)
    assert off.abs().max() < 5 / math.sqrt(512)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("keep", [1e-9, 0.3, 0.994, 1.0])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 300, 11, 11), (3, 7), (2, 5, 1), (2, 1, 2, 3, 1)])
def test_masks_of_single_precision_are_those_of_the_reference(
    poisoned: None, shape: tuple[int, ...], keep: float, threads: int
) -> None:
    torch.set_num_threads(threads)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(shape).to(dtype)
            x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
            ours, expected = erode_dropout(x, SEED, 5, keep), reference.erode_dropout(x, SEED, 5, keep)
            assert torch.equal(ours, expected) and ours.stride() == expected.stride()
    finally:
        torch.set_num_threads(1)


def test_masks_depend_on_no_default_and_no_type_of_a_number() -> None:
    x = torch.randn(2, 3, 4, 5)
    expected = erode_dropout(x, SEED, 5, 0.5)
    try:
        torch.set_default_dtype(torch.bfloat16)
        torch.set_default_device("meta")
        found = erode_dropout(x, SEED, 5, np.float32(0.5))
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(found, expected)
    with FakeTensorMode():
        fake = torch.ones(2, 3, 4, 5)
        assert torch.ops.robplug_ghost.erode_dropout(fake, SEED, 5, 0.5).shape == x.shape


def test_masks_keep_their_share_and_are_independent() -> None:
    for keep in (0.5, 0.9, 0.994):
        mask = reference.kept(SEED, 1, 64, 1001, keep, CPU).double()
        assert abs(mask.mean() - keep) < 5 * math.sqrt(keep * (1 - keep) / mask.numel())
    masks = torch.stack([reference.kept(s, layer, 8, 500, 0.5, CPU).flatten() for s in (1, 2) for layer in range(8)])
    off = torch.corrcoef(masks.double()) - torch.eye(16, dtype=torch.float64)
    assert off.abs().max() < 5 / math.sqrt(4000)


def test_mean_over_draws_is_the_plain_sum_and_the_variance_what_the_width_says() -> None:
    """Mean shortcut + residual; variance skip**2 / 3 * shortcut**2."""
    shortcut, residual, draws = torch.randn(1, 3, 4, 4).double(), torch.randn(1, 3, 4, 4).double(), 2000
    out = torch.cat([erode_add(shortcut, residual, seed, 3, 0.22) for seed in range(draws)])
    variance = 0.22**2 / 3 * shortcut[0].square()
    assert ((out.mean(0) - (shortcut + residual)[0]).abs() <= 5 * (variance / draws).sqrt()).all()
    torch.testing.assert_close(out.var(0), variance, rtol=5 * math.sqrt(0.8 / draws), atol=0)


def test_dropout_keeps_the_mean() -> None:
    x, draws = torch.randn(1, 3, 4, 4).double(), 2000
    out = torch.cat([erode_dropout(x, seed, 3, 0.8) for seed in range(draws)])
    variance = 0.2 / 0.8 * x[0].square()
    assert ((out.mean(0) - x[0]).abs() <= 5 * (variance / draws).sqrt()).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_no_erosion_is_the_plain_operation_bit_for_bit(dtype: torch.dtype) -> None:
    shortcut, residual = (torch.randn(2, 3, 4, 5).to(dtype) for _ in range(2))
    assert torch.equal(erode_add(shortcut, residual, SEED, 3, 0.0), shortcut + residual)
    assert torch.equal(erode_add(shortcut, residual, SEED, 3, 0.0, "relu"), (shortcut + residual).relu())
    assert torch.equal(erode_scale(shortcut, SEED, 3, 0.0), shortcut)
    assert torch.equal(erode_dropout(shortcut, SEED, 3, 1.0), shortcut)


@pytest.mark.parametrize("erode", [erode_scale, erode_dropout])
def test_the_ghost_knows_neither_batch_nor_layout_nor_dtype(erode: Any) -> None:
    x = torch.randn(5, 6, 3, 7)
    out = erode(x, SEED, 3, 0.5)
    assert torch.equal(erode(x[3:4], SEED, 3, 0.5), out[3:4])
    last = erode(x.to(memory_format=torch.channels_last), SEED, 3, 0.5)
    assert torch.equal(last, out) and last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(erode(x.mT.contiguous().mT, SEED, 3, 0.5), out)
    torch.testing.assert_close(erode(x.double(), SEED, 3, 0.5).float(), out, rtol=1e-6, atol=0)
    assert torch.equal(erode(x, SEED, 3, 0.5), out)
    for other in ((SEED + 1, 3), (SEED, 4), (SEED % 2**32, 3), (SEED + 2**40, 3)):
        assert not torch.equal(erode(x, *other, 0.5), out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    shortcut, residual = (torch.rand(2, 3, 4, 5).to(dtype) for _ in range(2))
    for call in (
        lambda s, r: erode_add(s, r, SEED, 3, 0.22),
        lambda s, r: erode_scale(s, SEED, 3, 0.22),
        lambda s, r: erode_dropout(s, SEED, 3, 0.7),
    ):
        out, exact = call(shortcut, residual), call(shortcut.double(), residual.double())
        assert out.dtype == dtype
        assert ((out.double() - exact).abs() / exact.abs().clamp_min(1e-9)).max() <= torch.finfo(dtype).eps / 2 * 1.001


def test_two_dtypes_give_what_a_plain_sum_gives() -> None:
    out = erode_add(X.half(), X, SEED, 3, 0.0)
    assert out.dtype == torch.float32 and torch.equal(out, X.half() + X)


OPERATORS = torch.ops.robplug_ghost
FUNCTIONS = (erode_add, erode_scale, erode_dropout)
EACH = pytest.mark.parametrize("way", ["as called", "as operators"])


def ways(way: str) -> tuple[Any, Any, Any, Any]:
    """Returns the sum, that behind a ReLU, the scaling and the dropout: as called, on the CPU, or as operators."""
    if way == "as called":
        return erode_add, lambda *a: erode_add(*a, "relu"), erode_scale, erode_dropout
    add = OPERATORS.erode_add
    return lambda *a: add(*a, False), lambda *a: add(*a, True), OPERATORS.erode_scale, OPERATORS.erode_dropout


@EACH
def test_gradients(way: str) -> None:
    add, behind_relu, scale, dropout = ways(way)
    shortcut, residual = (torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda s, r: behind_relu(s, r, SEED, 3, 0.22), (shortcut, residual))
    assert torch.autograd.gradcheck(lambda s, r: add(s, r, SEED, 3, 0.22), (shortcut, residual))
    assert torch.autograd.gradgradcheck(lambda s, r: add(s, r, SEED, 3, 0.22), (shortcut, residual))
    for call in (lambda s: scale(s, SEED, 3, 0.22), lambda s: dropout(s, SEED, 3, 0.7)):
        assert torch.autograd.gradcheck(call, (shortcut,))
        assert torch.autograd.gradgradcheck(call, (shortcut,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_is_called_is_the_operator_bit_for_bit(dtype: torch.dtype, layout: torch.memory_format) -> None:
    s, r = (torch.randn(3, 5, 4, 6).to(dtype).contiguous(memory_format=layout) for _ in range(2))
    for one, other in zip(ways("as called"), ways("as operators"), strict=True):
        args = (s,) if one in FUNCTIONS[1:] else (s, r)
        amount = 0.7 if one is erode_dropout else 0.22
        found, expected = one(*args, SEED, 3, amount), other(*args, SEED, 3, amount)
        assert found.dtype == dtype and found.stride() == expected.stride() and torch.equal(found, expected)


def test_a_second_derivative_behind_a_relu_is_refused_by_the_operator_and_right_as_called() -> None:
    s, r = X.clone().requires_grad_(), X.clone().requires_grad_()
    slopes = []
    for behind_relu in (ways("as operators")[1], ways("as called")[1]):
        square = behind_relu(s, r, SEED, 3, 0.22).square().sum()
        slopes += torch.autograd.grad(square, s, create_graph=True)
    assert torch.equal(*slopes)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        slopes[0].sum().backward()
    (curvature,) = torch.autograd.grad(slopes[1].sum(), s)
    weight = erode_scale(torch.ones_like(X), SEED, 3, 0.22)
    expected = 2 * weight.square() * (erode_add(s, r, SEED, 3, 0.22) > 0)
    torch.testing.assert_close(curvature, expected)


@EACH
def test_little_is_kept_for_the_gradient_but_the_result_of_a_relu(way: str) -> None:
    """The operators keep nothing; as called on the CPU, weights and the mask of one sample are kept."""
    add, behind_relu, scale, dropout = ways(way)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    s, r = X.clone().requires_grad_(), X.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        add(s, r, SEED, 3, 0.22)
        scale(s, SEED, 3, 0.22)
        dropout(s, SEED, 3, 0.7)
        sizes = [tensor.numel() for tensor in kept]
        channels = X.shape[1]
        assert sizes == ([] if way == "as operators" else [channels, channels, X[0].numel()])
        kept.clear()
        out = behind_relu(s, r, SEED, 3, 0.22)
    kept = [tensor for tensor in kept if tensor.shape == X.shape]
    assert len(kept) == 1 and torch.equal(kept[0], out)


def test_opcheck() -> None:
    utils = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    x = X.clone().requires_grad_()
    last = X.to(memory_format=torch.channels_last).requires_grad_()
    for one, other, relu in ((x, last, False), (last, X.mT.contiguous().mT.requires_grad_(), True)):
        torch.library.opcheck(ops._erode_add, (one, other, SEED, 3, 0.22, relu), test_utils=utils)
        torch.library.opcheck(ops._erode_add_backward, (one, other, SEED, 3, 0.22), test_utils=utils[::2])
        torch.library.opcheck(ops._erode_scale, (other, SEED, 3, 0.22), test_utils=utils)
        torch.library.opcheck(ops._erode_dropout, (other, SEED, 3, 0.7), test_utils=utils)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: erode_add(X.long(), X.long(), 0, 0, 0.2), TypeError, r"got torch.int64; .*residual.float\(\)"),
        (lambda: erode_add(X, X[:1], 0, 0, 0.2), ValueError, r"shortcut \(1, 3, 4, 5\).*got \(2, 3, 4, 5\)"),
        (lambda: erode_add(X, X, 0, 0, 0.2, "gelu"), ValueError, "'relu' or None, got 'gelu'"),  # type: ignore[arg-type]
        (lambda: erode_scale(X[0, 0, 0], 0, 0, 0.2), ValueError, r"\(N, C, ...\), got \(5,\)"),
        (lambda: erode_scale(X, 0, 0, -0.1), ValueError, "0 <= skip <= 1, got -0.1"),
        (lambda: erode_scale(X, 0, 0, 1.1), ValueError, "0 <= skip <= 1, got 1.1"),
        (lambda: erode_scale(X, 0, 0, math.nan), ValueError, "got nan"),
        (lambda: erode_scale(X, -1, 0, 0.1), ValueError, r"seed from 0 to 2\*\*63 - 1, got -1"),
        (lambda: erode_scale(X, 0, 2**31, 0.1), ValueError, "layer from 0 .* got 2147483648"),
        (lambda: erode_dropout(X, 0, 0, 0.0), ValueError, "0 < keep <= 1, got 0.0"),
        (lambda: erode_dropout(X, 0, 0, 1.5), ValueError, "0 < keep <= 1, got 1.5"),
    ],
)
def test_bad_input_is_refused_with_value_and_remedy(call: Any, kind: type[Exception], words: str) -> None:
    check_refused(call, kind, words)


def test_no_empty_batch_is_refused_and_no_input_written() -> None:
    x = X[:0].clone().requires_grad_()
    for out in (erode_add(x, x, 0, 0, 0.2, "relu"), erode_scale(x, 0, 0, 0.2), erode_dropout(x, 0, 0, 0.9)):
        assert out.shape == x.shape and torch.autograd.grad(out.sum(), x)[0].shape == x.shape
    x, before = X.clone().requires_grad_(), X.clone()
    for out in (erode_add(x, x, 0, 0, 0.2, "relu"), erode_scale(x, 0, 0, 0.2), erode_dropout(x, 0, 0, 0.9)):
        out.sum().backward()
    assert torch.equal(x.detach(), before)


def test_many_tables_of_weights_are_forgotten_and_come_back_the_same() -> None:
    first = reference.channel_weights(1, 0, 8, 0.5).clone()
    for seed in range(2, 3 * reference.REMEMBERED):
        reference.channel_weights(seed, 0, 8, 0.5)
    assert len(reference._tables) <= reference.REMEMBERED
    assert torch.equal(reference.channel_weights(1, 0, 8, 0.5), first)


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, robplug_ghost, robplug_ghost.plugin; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

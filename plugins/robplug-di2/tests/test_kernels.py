"""resize_pad against its definition and PyTorch's own interpolate and pad, its derivatives, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from robplug.testing.kernels import check_refused
from robplug_di2 import resize_pad
from robplug_di2.kernels import ops

X = torch.rand(2, 3, 4, 5)
SIZE = torch.tensor([[5, 6], [4, 7]])
OFFSET = torch.tensor([[1, 0], [0, 1]])
CANVAS = (6, 8)
MODES = ("nearest", "bilinear")


def by_pytorch(x: Tensor, size: Tensor, offset: Tensor, canvas: tuple[int, int], mode: str, fill: float) -> Tensor:
    """Sample by sample, as one would type it."""
    rows = []
    for one, (height, width), (top, left) in zip(x, size.tolist(), offset.tolist(), strict=True):
        corners = {"align_corners": False} if mode == "bilinear" else {}
        small = F.interpolate(one[None], (height, width), mode=mode, **corners)
        pads = [left, canvas[1] - width - left, top, canvas[0] - height - top]
        rows.append(F.pad(small, pads, value=fill))
    return torch.cat(rows)


@pytest.mark.parametrize("mode", MODES)
def test_it_is_interpolate_and_pad(mode: str) -> None:
    x = torch.rand(3, 2, 13, 11, dtype=torch.float64)
    size, offset = torch.tensor([[13, 11], [16, 15], [7, 5]]), torch.tensor([[3, 5], [0, 2], [9, 10]])
    ours = resize_pad(x, size, offset, (17, 17), mode, 0.25)
    torch.testing.assert_close(ours, by_pytorch(x, size, offset, (17, 17), mode, 0.25), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("source", "sizes", "missed"), [(299, range(299, 330), 0), (256, [282], 1)])
def test_nearest_is_exact(source: int, sizes: Iterable[int], missed: int) -> None:
    """PyTorch is the same for every size of the paper, and a pixel short where its float32 scale is rounded down."""
    x = torch.arange(float(source)).view(1, 1, source, 1)
    for size in sizes:
        ours = resize_pad(x, torch.tensor([[size, 1]]), torch.tensor([[0, 0]]), (size + 1, 1), fill=-1.0).flatten()
        assert ours.tolist() == [q * source // size for q in range(size)] + [-1]
        assert int((F.interpolate(x, (size, 1)).flatten() != ours[:-1]).sum()) == missed


@pytest.mark.parametrize("mode", MODES)
def test_one_draw_expanded_to_all_is_that_draw_for_each(mode: Any) -> None:
    """By its strides the reference sees that the indices need be made once."""
    x, size, offset = X.clone().requires_grad_(), SIZE[1:], OFFSET[1:]
    once, each = (
        resize_pad(x, *pairs, CANVAS, mode, 0.5)
        for pairs in ((size.expand(2, 2), offset.expand(2, 2)), (size.repeat(2, 1), offset.repeat(2, 1)))
    )
    assert torch.equal(once, each)
    gradients = [torch.autograd.grad(out, x, torch.arange(288.0).view_as(out))[0] for out in (once, each)]
    assert torch.equal(*gradients)
    mixed = resize_pad(x, size.expand(2, 2), OFFSET, CANVAS, mode, 0.5)
    assert torch.equal(mixed, resize_pad(x, size.repeat(2, 1), OFFSET, CANVAS, mode, 0.5))


@pytest.mark.parametrize("mode", MODES)
def test_a_crop_of_the_canvas_is_the_resized_image(mode: str) -> None:
    out = resize_pad(X, SIZE, OFFSET, CANVAS, mode, 0.5)
    for n, ((height, width), (top, left)) in enumerate(zip(SIZE.tolist(), OFFSET.tolist(), strict=True)):
        alone = resize_pad(X[n : n + 1], SIZE[n : n + 1], torch.zeros(1, 2).long(), (height, width), mode)
        assert torch.equal(out[n, :, top : top + height, left : left + width], alone[0])
        border = out[n].clone()
        border[:, top : top + height, left : left + width] = 0.5
        assert (border == 0.5).all()


@pytest.mark.parametrize("mode", MODES)
def test_an_image_as_large_as_the_canvas_has_no_border(mode: str) -> None:
    full = torch.tensor(CANVAS).expand(2, 2)
    assert (resize_pad(X, full, torch.zeros(2, 2).long(), CANVAS, mode, -1.0) >= 0).all()
    own = torch.tensor(X.shape[2:]).expand(2, 2)
    assert torch.equal(resize_pad(X, own, torch.zeros(2, 2).long(), (4, 5), mode), X)


@pytest.mark.parametrize("mode", MODES)
def test_what_leaves_the_canvas_is_cut_off(mode: str) -> None:
    full = resize_pad(X, SIZE, torch.tensor([[2, 2], [2, 2]]), (12, 12), mode, 0.5)
    for top, left in ((-1, 0), (0, -2), (3, 4)):
        moved = resize_pad(X, SIZE, torch.tensor([[top, left]]).expand(2, 2), (4, 4), mode, 0.5)
        wide = F.pad(full, [4, 4, 4, 4], value=0.5)
        assert torch.equal(moved, wide[:, :, 6 - top : 10 - top, 6 - left : 10 - left])
    nothing = resize_pad(X, torch.tensor([[0, 3], [-2, 5]]), OFFSET, CANVAS, mode, 0.5)
    assert (nothing == 0.5).all()


@pytest.mark.parametrize("mode", MODES)
def test_gradients(mode: Any) -> None:
    x = torch.rand(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)

    def call(images: Tensor) -> Tensor:
        return resize_pad(images, SIZE, torch.tensor([[1, -1], [0, 1]]), CANVAS, mode, 0.5)

    assert torch.autograd.gradcheck(call, (x,))
    assert torch.autograd.gradgradcheck(call, (x,))


@pytest.mark.parametrize("mode", MODES)
def test_opcheck(mode: str) -> None:
    utils = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    bilinear = mode == "bilinear"
    x = X.clone().requires_grad_()
    torch.library.opcheck(ops._resize_pad, (x, SIZE, OFFSET, *CANVAS, bilinear, 0.5), test_utils=utils)
    g = torch.rand(2, 3, *CANVAS).to(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(ops._adjoint, (g, SIZE, OFFSET, 4, 5, bilinear), test_utils=utils[:3])


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: resize_pad((X * 255).byte(), SIZE, OFFSET, CANVAS), TypeError, r"got torch.uint8; .* / 255"),
        (lambda: resize_pad(X[0], SIZE, OFFSET, CANVAS), ValueError, r"\(N, C, H, W\), got \(3, 4, 5\); give a batch"),
        (lambda: resize_pad(X[:, :, :0], SIZE, OFFSET, CANVAS), ValueError, "sides from 1 to 16384, got 0"),
        (lambda: resize_pad(X, SIZE, OFFSET, (6, 2**15)), ValueError, "got 32768; cut"),
        (lambda: resize_pad(X, SIZE.int(), OFFSET, CANVAS), TypeError, "expected size of torch.int64, got torch.int32"),
        (lambda: resize_pad(X, SIZE, OFFSET[0], CANVAS), ValueError, r"offset of shape \(2, 2\), got \(2,\); .*expand"),
        (lambda: resize_pad(X, SIZE.to("meta"), OFFSET, CANVAS), ValueError, "size on cpu, where x is, got meta"),
        (lambda: resize_pad(X, SIZE, OFFSET, CANVAS, "cubic"), ValueError, "'nearest' or 'bilinear', got 'cubic'"),  # type: ignore[arg-type]
    ],
)
def test_bad_input_is_refused_with_value_and_remedy(call: Any, kind: type[Exception], words: str) -> None:
    check_refused(call, kind, words)


def test_no_empty_batch_is_refused_and_no_input_written() -> None:
    x = X[:0].requires_grad_()
    out = resize_pad(x, SIZE[:0], OFFSET[:0], CANVAS)
    assert out.shape == (0, 3, *CANVAS) and torch.autograd.grad(out.sum(), x)[0].shape == x.shape
    x, before = X.clone().requires_grad_(), X.clone()
    resize_pad(x, SIZE, OFFSET, CANVAS, "bilinear").square().sum().backward()
    assert torch.equal(x.detach(), before)


def test_half_precision_is_rounded_once() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        x = X.to(dtype)
        exact = resize_pad(x.double(), SIZE, OFFSET, CANVAS, "bilinear", 0.5)
        out = resize_pad(x, SIZE, OFFSET, CANVAS, "bilinear", 0.5)
        assert out.dtype == dtype and (out.double() - exact).abs().max() <= torch.finfo(dtype).eps / 2


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, robplug_di2, robplug_di2.plugin; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

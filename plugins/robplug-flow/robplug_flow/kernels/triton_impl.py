"""The kernels in Triton, for CUDA: same names, arguments and results as in ``reference.py``.

A program works on BLOCK pixels of one image and goes through its channels. Offsets into a batch are int64, those
inside of one image's pixel count int32. Sums over pixels leave as one partial sum a program, so that their order is
fixed; only `warp_adjoint` adds atomically.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from robplug_flow.kernels.reference import SOFTENING, accumulator

BLOCK = 512


@triton.jit
def _pixels(height, width, BLOCK: tl.constexpr):
    """Returns the image (int64), the block in it, and row, column and existence of the block's pixels."""
    blocks = tl.cdiv(height * width, BLOCK)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    pixel = block * BLOCK + tl.arange(0, BLOCK)
    return n, block, pixel // width, pixel % width, pixel < height * width


@triton.jit
def _at(row, col, stride_h, stride_w):
    return row.to(tl.int64) * stride_h + col.to(tl.int64) * stride_w


@triton.jit
def _load(pointer, inside, ACC: tl.constexpr):
    return tl.load(pointer, mask=inside, other=0.0).to(ACC)


@triton.jit
def _neighbours(offset, position, size):
    """Returns both neighbours of position + offset and the weight of the second; see the reference."""
    # where, not minimum: a NaN stays
    offset = tl.where(offset > size, size, tl.where(offset < -size, -size, offset))
    whole = tl.floor(offset)
    weight = offset - whole
    first = position + tl.where(whole == whole, whole, 0.0).to(tl.int32)
    second = tl.minimum(tl.maximum(first + 1, 0), size - 1)
    return tl.minimum(tl.maximum(first, 0), size - 1), second, weight


@triton.jit
def _corners(flow, f_c, row, col, inside, height, width, stride_h, stride_w, ACC: tl.constexpr):
    """Returns the offsets of the four corners of an image with these strides, and the lower and right weights."""
    upper, lower, down = _neighbours(_load(flow, inside, ACC), row, height)
    left, right, along = _neighbours(_load(flow + f_c, inside, ACC), col, width)
    ul, ur = _at(upper, left, stride_h, stride_w), _at(upper, right, stride_h, stride_w)
    ll, lr = _at(lower, left, stride_h, stride_w), _at(lower, right, stride_h, stride_w)
    return ul, ur, ll, lr, down, along


@triton.jit
def _warp_kernel(
    x, flow, out, channels, height, width, x_n, x_c, x_h, x_w, f_n, f_c, f_h, f_w, o_n, o_c, o_h, o_w,
    ACC: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    n, _, row, col, inside = _pixels(height, width, BLOCK)
    flow += n * f_n + _at(row, col, f_h, f_w)
    at_ul, at_ur, at_ll, at_lr, down, along = _corners(flow, f_c, row, col, inside, height, width, x_h, x_w, ACC)
    x += n * x_n
    out += n * o_n + _at(row, col, o_h, o_w)
    for _c in range(channels):
        ul, ur = _load(x + at_ul, inside, ACC), _load(x + at_ur, inside, ACC)
        ll, lr = _load(x + at_ll, inside, ACC), _load(x + at_lr, inside, ACC)
        top = ul + along * (ur - ul)
        bottom = ll + along * (lr - ll)
        tl.store(out, (top + down * (bottom - top)).to(out.dtype.element_ty), mask=inside)
        x, out = x + x_c, out + o_c


@triton.jit
def _warp_adjoint_kernel(
    g, flow, out, channels, height, width, g_n, g_c, g_h, g_w, f_n, f_c, f_h, f_w, o_n, o_c, o_h, o_w,
    ACC: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    n, _, row, col, inside = _pixels(height, width, BLOCK)
    flow += n * f_n + _at(row, col, f_h, f_w)
    at_ul, at_ur, at_ll, at_lr, down, along = _corners(flow, f_c, row, col, inside, height, width, o_h, o_w, ACC)
    g += n * g_n + _at(row, col, g_h, g_w)
    out += n * o_n
    for _c in range(channels):
        here = _load(g, inside, ACC)
        bottom = here * down
        top = here - bottom
        tl.atomic_add(out + at_ul, top - top * along, mask=inside)
        tl.atomic_add(out + at_ur, top * along, mask=inside)
        tl.atomic_add(out + at_ll, bottom - bottom * along, mask=inside)
        tl.atomic_add(out + at_lr, bottom * along, mask=inside)
        g, out = g + g_c, out + o_c


@triton.jit
def _warp_flow_gradient_kernel(
    g, x, flow, out, channels, height, width,
    g_n, g_c, g_h, g_w, x_n, x_c, x_h, x_w, f_n, f_c, f_h, f_w, o_n, o_c, o_h, o_w,
    ACC: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    # d/d down = (ll - ul) + along * ((lr - ur) - (ll - ul)); d/d along = (ur - ul) + down * ((lr - ll) - (ur - ul))
    n, _, row, col, inside = _pixels(height, width, BLOCK)
    flow += n * f_n + _at(row, col, f_h, f_w)
    at_ul, at_ur, at_ll, at_lr, down, along = _corners(flow, f_c, row, col, inside, height, width, x_h, x_w, ACC)
    x += n * x_n
    g += n * g_n + _at(row, col, g_h, g_w)
    by_row, by_col = tl.zeros([BLOCK], dtype=ACC), tl.zeros([BLOCK], dtype=ACC)
    for _c in range(channels):
        ul, ur = _load(x + at_ul, inside, ACC), _load(x + at_ur, inside, ACC)
        ll, lr = _load(x + at_ll, inside, ACC), _load(x + at_lr, inside, ACC)
        here = _load(g, inside, ACC)
        by_row += here * ((ll - ul) + along * ((lr - ur) - (ll - ul)))
        by_col += here * ((ur - ul) + down * ((lr - ll) - (ur - ul)))
        x, g = x + x_c, g + g_c
    out += n * o_n + _at(row, col, o_h, o_w)
    tl.store(out, by_row.to(out.dtype.element_ty), mask=inside)
    tl.store(out + o_c, by_col.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _slopes(x, g, channels, inside, below, beside, x_c, x_h, x_w, g_c, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Returns sum_c g_c D_row x_c and sum_c g_c D_col x_c; x and g point at the pixels, which exist where inside."""
    by_row, by_col = tl.zeros([BLOCK], dtype=ACC), tl.zeros([BLOCK], dtype=ACC)
    for _c in range(channels):
        value, upstream = _load(x, inside, ACC), _load(g, inside, ACC)
        next_row, next_col = _load(x + x_h, below, ACC), _load(x + x_w, beside, ACC)
        by_row += tl.where(below, upstream * (next_row - value), 0.0)
        by_col += tl.where(beside, upstream * (next_col - value), 0.0)
        x, g = x + x_c, g + g_c
    return by_row, by_col


@triton.jit
def _penalty_kernel(
    x, g, partial, channels, height, width, x_n, x_c, x_h, x_w, g_n, g_c, g_h, g_w, p_n, p_b, p_k,
    ACC: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    n, block, row, col, inside = _pixels(height, width, BLOCK)
    below, beside = inside & (row + 1 < height), inside & (col + 1 < width)
    x += n * x_n + _at(row, col, x_h, x_w)
    g += n * g_n + _at(row, col, g_h, g_w)
    by_row, by_col = _slopes(x, g, channels, inside, below, beside, x_c, x_h, x_w, g_c, ACC, BLOCK)
    partial += n * p_n + block.to(tl.int64) * p_b
    tl.store(partial, tl.sum(by_row * by_row, axis=0))
    tl.store(partial + p_k, tl.sum(by_col * by_col, axis=0))


@triton.jit
def _penalty_gradient_kernel(
    scale, x, g, grad_x, grad_g, channels, height, width,
    s_n, s_k, x_n, x_c, x_h, x_w, g_n, g_c, g_h, g_w, a_n, a_c, a_h, a_w, b_n, b_c, b_h, b_w,
    NEED_X: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    # a = scale_row * sum_c g_c D_row x_c, b likewise along columns;
    # d/dg_c(p) = a(p) D_row x_c(p) + b(p) D_col x_c(p)
    # d/dx_c(p) = a(p - row) g_c(p - row) - a(p) g_c(p) + b(p - col) g_c(p - col) - b(p) g_c(p)
    n, _, row, col, inside = _pixels(height, width, BLOCK)
    scale_row, scale_col = tl.load(scale + n * s_n), tl.load(scale + n * s_n + s_k)
    below, beside = inside & (row + 1 < height), inside & (col + 1 < width)
    above, before = inside & (row > 0), inside & (col > 0)
    x += n * x_n + _at(row, col, x_h, x_w)
    g += n * g_n + _at(row, col, g_h, g_w)
    a, b = _slopes(x, g, channels, inside, below, beside, x_c, x_h, x_w, g_c, ACC, BLOCK)
    a, b = scale_row * a, scale_col * b
    if NEED_X:
        a_above, _b = _slopes(x - x_h, g - g_h, channels, above, above, above & beside, x_c, x_h, x_w, g_c, ACC, BLOCK)
        _a, b_before = _slopes(
            x - x_w, g - g_w, channels, before, before & below, before, x_c, x_h, x_w, g_c, ACC, BLOCK
        )
        a_above, b_before = scale_row * a_above, scale_col * b_before
        grad_x += n * a_n + _at(row, col, a_h, a_w)
    grad_g += n * b_n + _at(row, col, b_h, b_w)
    for _c in range(channels):
        value = _load(x, inside, ACC)
        next_row, next_col = _load(x + x_h, below, ACC), _load(x + x_w, beside, ACC)
        change = tl.where(below, a * (next_row - value), 0.0) + tl.where(beside, b * (next_col - value), 0.0)
        tl.store(grad_g, change.to(grad_g.dtype.element_ty), mask=inside)
        if NEED_X:
            here = _load(g, inside, ACC)
            g_above, g_before = _load(g - g_h, above, ACC), _load(g - g_w, before, ACC)
            change = a_above * g_above - a * here + b_before * g_before - b * here
            tl.store(grad_x, change.to(grad_x.dtype.element_ty), mask=inside)
            g, grad_x = g + g_c, grad_x + a_c
        x, grad_g = x + x_c, grad_g + b_c


@triton.jit
def _smoothness_kernel(
    flow, partial, gradient, height, width, f_n, f_c, f_h, f_w, p_n, p_b, o_n, o_c, o_h, o_w,
    SOFTENING: tl.constexpr, DIAGONAL: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    # gradient(p) = sum over neighbours q of 2 (flow(p) - flow(q)) / root, as the sum has the pair as (p, q) and (q, p)
    n, block, row, col, inside = _pixels(height, width, BLOCK)
    flow += n * f_n
    here = flow + _at(row, col, f_h, f_w)
    u, v = _load(here, inside, ACC), _load(here + f_c, inside, ACC)
    total = tl.zeros([BLOCK], dtype=ACC)
    pull_u, pull_v = tl.zeros([BLOCK], dtype=ACC), tl.zeros([BLOCK], dtype=ACC)
    for k in tl.static_range(4):
        # diagonal: (-1, -1) (1, -1) (-1, 1) (1, 1); adjacent: (-1, 0) (1, 0) (0, -1) (0, 1)
        if DIAGONAL:
            row_q, col_q = row + (2 * (k % 2) - 1), col + (2 * (k // 2) - 1)
        else:
            row_q, col_q = row + (2 * (k % 2) - 1) * (1 - k // 2), col + (2 * (k % 2) - 1) * (k // 2)
        exists = inside & (row_q >= 0) & (row_q < height) & (col_q >= 0) & (col_q < width)
        there = flow + _at(row_q, col_q, f_h, f_w)
        du = u - _load(there, exists, ACC)
        dv = v - _load(there + f_c, exists, ACC)
        root = tl.sqrt(du * du + dv * dv + SOFTENING)
        total += tl.where(exists, root, 0.0)
        pull_u += tl.where(exists, 2 * du / root, 0.0)
        pull_v += tl.where(exists, 2 * dv / root, 0.0)
    tl.store(partial + n * p_n + block.to(tl.int64) * p_b, tl.sum(total, axis=0))
    gradient += n * o_n + _at(row, col, o_h, o_w)
    tl.store(gradient, pull_u.to(gradient.dtype.element_ty), mask=inside)
    tl.store(gradient + o_c, pull_v.to(gradient.dtype.element_ty), mask=inside)


def warp(x: Tensor, flow: Tensor, block: int = BLOCK) -> Tensor:
    """See `robplug_flow.kernels.reference.warp`."""
    out = torch.empty_like(x)
    _launch(_warp_kernel, block, x.shape[1:], (x, flow, out))
    return out


def warp_adjoint(g: Tensor, flow: Tensor, block: int = BLOCK) -> Tensor:
    """See `robplug_flow.kernels.reference.warp_adjoint`; adds atomically, in no fixed order."""
    if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
        remedy = "detach x, or use torch.use_deterministic_algorithms(True, warn_only=True)"
        raise RuntimeError(f"expected a deterministic gradient of warp in x, got atomic additions on CUDA; {remedy}")
    out = torch.zeros_like(g, dtype=accumulator(g, flow))
    _launch(_warp_adjoint_kernel, block, g.shape[1:], (g, flow, out))
    return out.to(g.dtype)


def warp_flow_gradient(g: Tensor, x: Tensor, flow: Tensor, block: int = BLOCK) -> Tensor:
    """See `robplug_flow.kernels.reference.warp_flow_gradient`."""
    out = torch.empty_like(flow)
    _launch(_warp_flow_gradient_kernel, block, x.shape[1:], (g, x, flow, out))
    return out


def flow_gradient_penalty(x: Tensor, g: Tensor, kappa_row: float, kappa_col: float, block: int = BLOCK) -> Tensor:
    """See `robplug_flow.kernels.reference.flow_gradient_penalty`."""
    partial = x.new_empty((len(x), _blocks(x.shape, block), 2), dtype=accumulator(x, g))
    _launch(_penalty_kernel, block, x.shape[1:], (x, g, partial))
    by_row, by_col = partial.sum(1).unbind(1)
    return kappa_row**2 * by_row + kappa_col**2 * by_col


def flow_gradient_penalty_gradient(
    u: Tensor, x: Tensor, g: Tensor, kappa_row: float, kappa_col: float, need_x: bool, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """See `robplug_flow.kernels.reference.flow_gradient_penalty_gradient`."""
    grad_x, grad_g = torch.empty_like(x) if need_x else x.new_empty(0), torch.empty_like(g)
    scale = torch.stack([2 * kappa_row**2 * u, 2 * kappa_col**2 * u], dim=1).to(accumulator(x, g))
    written = grad_x if need_x else grad_g  # the kernel leaves the first alone unless need_x
    _launch(_penalty_gradient_kernel, block, x.shape[1:], (scale, x, g, written, grad_g), NEED_X=need_x)
    return grad_x, grad_g


def flow_smoothness(flow: Tensor, neighbours: str, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """See `robplug_flow.kernels.reference.flow_smoothness`."""
    partial = flow.new_empty((len(flow), _blocks(flow.shape, block)), dtype=accumulator(flow))
    gradient = torch.empty_like(flow)
    constants = {"SOFTENING": SOFTENING, "DIAGONAL": neighbours == "diagonal"}
    _launch(_smoothness_kernel, block, flow.shape[2:], (flow, partial, gradient), **constants)
    return partial.sum(1), gradient


def _blocks(shape: Sequence[int], block: int) -> int:
    return -(-shape[-2] * shape[-1] // block)


def _launch(kernel: Any, block: int, sizes: Sequence[int], tensors: tuple[Tensor, ...], **constants: Any) -> None:
    """Launches a program for each block of pixels of each sample, on the tensors' device.

    Args:
        kernel: takes the tensors, the sizes, the tensors' strides and the constants, in this order.
        block: pixels of a program.
        sizes: of the images; height and width are the last two.
        tensors: N of each.
        constants: compiled into the kernel.
    """
    if sizes[-2] * sizes[-1] >= 2**31 - block:
        size = f"{sizes[-2]}x{sizes[-1]}"
        raise ValueError(f"expected images of fewer than 2**31 pixels, got {size}; cut them into tiles")
    programs = len(tensors[0]) * _blocks(sizes, block)
    strides = [stride for tensor in tensors for stride in tensor.stride()]
    acc = tl.float64 if accumulator(*tensors) == torch.float64 else tl.float32
    if programs:
        with torch.cuda.device_of(tensors[0]):
            kernel[(programs,)](*tensors, *sizes, *strides, ACC=acc, BLOCK=block, **constants)

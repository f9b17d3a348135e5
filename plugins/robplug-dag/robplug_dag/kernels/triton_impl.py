"""The kernels in Triton, for CUDA: same names, arguments and results as in ``reference.py``.

A program of the dense gradient has some targets of one image and goes through their classes twice: reading logits, then
writing the gradient. A program of the step has some values of one image, in the order of memory. What a program found
out about its image, a count or a maximum, has a place of its own, so that nothing is added up in an order that varies.
Offsets into a tensor are int64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from robplug_dag.kernels.reference import class_axis, empty, memory_format

TILE = 1024  # values
TOGETHER = 4  # classes that are read at once where they are no neighbours in memory


@triton.jit
def _dense_adversary_grad_kernel(
    logits, labels, goals, out, found, classes, targets, tiles,
    x_n, x_c, x_t, l_n, l_t, g_n, g_t, o_n, o_c, o_t,
    UNTIL_GOAL: tl.constexpr, ACC: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    n = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    t = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = t < targets
    label = tl.load(labels + n * l_n + t * l_t, mask=inside, other=-1)
    goal = tl.load(goals + n * g_n + t * g_t, mask=inside, other=-1)
    valid = (label >= 0) & (label < classes) & (goal >= 0) & (goal < classes) & (label != goal)
    best = tl.full((ROWS,), float("-inf"), ACC)
    prediction = tl.zeros((ROWS,), tl.int32)
    unknown = tl.zeros((ROWS,), tl.int32)
    for first in range(0, classes, COLS):
        c = first + tl.arange(0, COLS)
        here = (c < classes)[:, None] & inside[None, :]
        place = n * x_n + (c.to(tl.int64) * x_c)[:, None] + (t * x_t)[None, :]
        value = tl.load(logits + place, mask=here, other=float("-inf")).to(ACC)
        unknown = tl.maximum(unknown, tl.max((value != value).to(tl.int32), axis=0))
        top, at = tl.max(tl.where(value != value, float("-inf"), value), axis=0, return_indices=True)
        prediction = tl.where(top > best, first + at.to(tl.int32), prediction)
        best = tl.maximum(best, top)
    watched = goal if UNTIL_GOAL else label
    predicted = (prediction == watched) & (unknown == 0)
    active = valid & (predicted != UNTIL_GOAL)
    for first in range(0, classes, COLS):
        c = first + tl.arange(0, COLS)
        here = (c < classes)[:, None] & inside[None, :]
        place = n * o_n + (c.to(tl.int64) * o_c)[:, None] + (t * o_t)[None, :]
        up = (c[:, None] == goal[None, :]) & active[None, :]
        down = (c[:, None] == label[None, :]) & active[None, :]
        tl.store(out + place, (up.to(tl.float32) - down.to(tl.float32)).to(out.dtype.element_ty), mask=here)
    nan = tl.max((valid & (unknown != 0)).to(tl.int32), axis=0)
    count = tl.sum(active.to(tl.int32), axis=0)
    tl.store(found + n * tiles + tile, tl.where(nan != 0, -1, count))


@triton.jit
def _largest_kernel(gradient, found, values, tiles, ACC: tl.constexpr, BLOCK: tl.constexpr):
    n = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    k = (tile * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    size = tl.abs(tl.load(gradient + n * values + k, mask=k < values, other=0.0).to(ACC))
    unknown = tl.max((size != size).to(tl.int32), axis=0)
    largest = tl.max(tl.where(size != size, 0.0, size), axis=0)
    tl.store(found + n * tiles + tile, tl.where(unknown != 0, float("nan"), largest))


@triton.jit
def _step_kernel(
    gradient, r, x, size, moved, image, values, tiles,
    GAMMA: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    n = (tl.program_id(0) // tiles).to(tl.int64)
    k = ((tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = k < values
    place = n * values + k
    largest = tl.load(size + n)
    largest = tl.where(largest == 0, 1.0, largest)
    g = tl.load(gradient + place, mask=inside, other=0.0).to(ACC)
    if ACC == tl.float32:
        direction = tl.div_rn(g, largest + tl.zeros_like(g))  # `/` loses divisors above 2**126
    else:
        direction = g / largest
    total = tl.load(r + place, mask=inside, other=0.0) + GAMMA * direction
    tl.store(moved + place, total, mask=inside)
    value = tl.load(x + place, mask=inside, other=0.0).to(ACC) + total
    value = tl.where(value < LOW, LOW, value)  # a NaN stays
    value = tl.where(value > HIGH, HIGH, value)
    tl.store(image + place, value.to(image.dtype.element_ty), mask=inside)


def dense_adversary_grad(
    logits: Tensor, labels: Tensor, goals: Tensor, until_goal: bool, tile: int = TILE
) -> tuple[Tensor, Tensor]:
    """See `robplug_dag.kernels.reference.dense_adversary_grad`."""
    out = empty(logits)
    if not out.numel():
        return out, logits.new_zeros(len(logits), dtype=torch.int64)
    before, after = (part.flatten(2) if class_axis(logits) == 1 else part.mT for part in (logits, out))
    flat = before, labels.flatten(1), goals.flatten(1), after
    samples, classes, targets = after.shape
    cols = min(triton.next_power_of_2(classes), TOGETHER if before.stride(1) != 1 else tile)
    rows = min(triton.next_power_of_2(targets), max(tile // cols, 1))
    tiles = triton.cdiv(targets, rows)
    found = logits.new_empty(samples, tiles, dtype=torch.int64)
    strides = [stride for tensor in flat for stride in tensor.stride()]
    acc = tl.float64 if logits.dtype == torch.float64 else tl.float32
    with torch.cuda.device_of(out):
        _dense_adversary_grad_kernel[(samples * tiles,)](
            *flat, found, classes, targets, tiles, *strides, UNTIL_GOAL=until_goal, ACC=acc, COLS=cols, ROWS=rows
        )
    return out, found.sum(1).masked_fill_((found < 0).any(1), -1)


def normalised_step(
    gradient: Tensor, r: Tensor, x: Tensor, gamma: float, low: float, high: float, tile: int = TILE
) -> tuple[Tensor, Tensor, Tensor]:
    """See `robplug_dag.kernels.reference.normalised_step`."""
    moved, image = empty(x, r.dtype), empty(x)
    if not x.numel():
        return moved, image, r.new_zeros(len(x))
    gradient, r, x = (tensor.contiguous(memory_format=memory_format(x)) for tensor in (gradient, r, x))
    samples, values = len(x), x[0].numel()
    tiles = triton.cdiv(values, tile)
    acc = tl.float64 if r.dtype == torch.float64 else tl.float32
    found = r.new_empty(samples, tiles)
    grid = (samples * tiles,)
    with torch.cuda.device_of(x):
        _largest_kernel[grid](gradient, found, values, tiles, ACC=acc, BLOCK=tile)
        size = found.amax(1)
        bounds = {"GAMMA": gamma, "LOW": low, "HIGH": high}
        _step_kernel[grid](gradient, r, x, size, moved, image, values, tiles, **bounds, ACC=acc, BLOCK=tile)
    return moved, image, size

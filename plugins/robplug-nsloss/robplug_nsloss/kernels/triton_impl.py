"""The kernels in Triton, for CUDA: same names, arguments and results as in ``reference.py``.

Layers of one dtype go through one launch: a table of int64 has for each layer the number of its first program, its
size, its own number and its address in each list. The tensors of a layer are read in the order of memory, which is why
one with other strides is copied first. Sums are formed in a fixed order. Offsets into a tensor are int64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from robplug_nsloss.kernels.reference import accumulator, alike

BLOCK = 4096  # values of a program
PARTIALS = 1024  # sums of programs that are added at once
WHOLE = 16384  # values of a sample that one program can hold

_ACC = {torch.float32: tl.float32, torch.float64: tl.float64}
FIRST_PROGRAM, SIZE, NUMBER, ADDRESSES = (tl.constexpr(column) for column in range(4))


@triton.jit
def _place(table, layers, COLUMNS: tl.constexpr, LAYERS: tl.constexpr, BLOCK: tl.constexpr):
    """Returns this program's row of the table, its offsets in the layer and which of them exist."""
    each = tl.arange(0, LAYERS)
    first = tl.load(table + each * COLUMNS + FIRST_PROGRAM, mask=each < layers, other=9223372036854775807)
    layer = tl.sum((first <= tl.program_id(0)).to(tl.int32), axis=0) - 1
    row = table + layer * COLUMNS
    offset = (tl.program_id(0) - tl.load(row + FIRST_PROGRAM)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return row, offset, offset < tl.load(row + SIZE)


@triton.jit
def _tensor(row, number, example):
    """Returns the layer's pointer in the list with this number; ``example`` has its dtype."""
    return tl.load(row + ADDRESSES + number).to(tl.pointer_type(example.dtype.element_ty))


@triton.jit
def _signs(difference):
    return (difference > 0).to(tl.int8) - (difference < 0).to(tl.int8)


@triton.jit
def _difference_kernel(
    table, example, partial, layers,
    ADD: tl.constexpr, WRITE: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
    LAYERS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row, at, inside = _place(table, layers, COLUMNS, LAYERS, BLOCK)
    clean = tl.load(_tensor(row, 0, example) + at, mask=inside, other=0.0).to(ACC)
    difference = tl.load(_tensor(row, 1, example) + at, mask=inside, other=0.0).to(ACC) - clean
    if WRITE:
        sums = tl.load(row + ADDRESSES + 2).to(tl.pointer_type(tl.int8))
        signs = _signs(difference)
        tl.store(tl.load(row + ADDRESSES + 3).to(tl.pointer_type(tl.int8)) + at, signs, mask=inside)
        if ADD:
            signs += tl.load(sums + at, mask=inside, other=0)
        tl.store(sums + at, signs, mask=inside)
    tl.store(partial + tl.program_id(0), tl.sum(tl.abs(difference), axis=0))


@triton.jit
def _means_kernel(
    table, partial, means,
    STEP: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = table + tl.program_id(0) * COLUMNS
    first, size = tl.load(row + FIRST_PROGRAM), tl.load(row + SIZE)
    end = first + tl.cdiv(size, STEP)
    total = tl.zeros([BLOCK], dtype=ACC)
    for start in range(first, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(partial + at, mask=at < end, other=0.0)
    mean = tl.sum(total, axis=0) / size
    tl.store(means + tl.load(row + NUMBER), mean.to(means.dtype.element_ty))


@triton.jit
def _gradient_kernel(
    table, example, g, layers,
    BOTH: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
    LAYERS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row, at, inside = _place(table, layers, COLUMNS, LAYERS, BLOCK)
    clean = tl.load(_tensor(row, 0, example) + at, mask=inside, other=0.0).to(ACC)
    difference = tl.load(_tensor(row, 1, example) + at, mask=inside, other=0.0).to(ACC) - clean
    slope = _signs(difference).to(ACC) * (tl.load(g).to(ACC) / tl.load(row + SIZE))
    tl.store(_tensor(row, 2, example) + at, slope.to(example.dtype.element_ty), mask=inside)
    if BOTH:
        tl.store(_tensor(row, 3, example) + at, (-slope).to(example.dtype.element_ty), mask=inside)


@triton.jit
def _add_signs_kernel(g, signs, out, weight, size, ACC: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.load(signs + at, mask=inside, other=0).to(ACC) * (tl.load(weight).to(ACC) / size)
    total += tl.load(g + at, mask=inside, other=0.0).to(ACC)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sphere_kernel(x, noise, out, size, RADIUS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = at < size
    start = tl.program_id(0).to(tl.int64) * size
    draws = tl.load(noise + start + at, mask=inside, other=0.0).to(ACC)
    total = tl.load(x + start + at, mask=inside, other=0.0).to(ACC) + draws * _scale(tl.sum(draws * draws), RADIUS)
    tl.store(out + start + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _scale(squares, RADIUS: tl.constexpr):
    return RADIUS / tl.sqrt(tl.where(squares == 0, 1.0, squares))


@triton.jit
def _squares_kernel(noise, partial, size, parts, ACC: tl.constexpr, BLOCK: tl.constexpr):
    at = (tl.program_id(0) % parts).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    start = (tl.program_id(0) // parts).to(tl.int64) * size
    draws = tl.load(noise + start + at, mask=at < size, other=0.0).to(ACC)
    tl.store(partial + tl.program_id(0), tl.sum(draws * draws))


@triton.jit
def _move_kernel(
    x, noise, out, partial, size, parts,
    RADIUS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    sample = tl.program_id(0) // parts
    squares = tl.zeros([BLOCK], dtype=ACC)
    for first in range(0, parts, BLOCK):
        part = first + tl.arange(0, BLOCK)
        squares += tl.load(partial + sample.to(tl.int64) * parts + part, mask=part < parts, other=0.0)
    at = (tl.program_id(0) % parts).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    at += sample.to(tl.int64) * size
    draws = tl.load(noise + at, mask=inside, other=0.0).to(ACC)
    total = tl.load(x + at, mask=inside, other=0.0).to(ACC) + draws * _scale(tl.sum(squares), RADIUS)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def sphere_noise(x: Tensor, noise: Tensor, radius: float, block: int = BLOCK, whole: int = WHOLE) -> Tensor:
    """See `robplug_nsloss.kernels.reference.sphere_noise`; samples of at most ``whole`` values take one pass."""
    rows = alike(x, x)
    if len(x) > 1 and rows.stride(0) != x[0].numel():  # samples interleaved
        rows = rows.contiguous()
    noise, out = alike(noise, rows), torch.empty_like(rows)
    size, acc = x.numel() // max(len(x), 1), _ACC[accumulator(x)]
    if not x.numel():
        return out
    with torch.cuda.device_of(x):
        if size <= whole:
            fitting = triton.next_power_of_2(size)
            _sphere_kernel[(len(x),)](rows, noise, out, size, RADIUS=radius, ACC=acc, BLOCK=fitting)
        else:
            parts = triton.cdiv(size, block)
            partial = x.new_empty(len(x) * parts, dtype=accumulator(x))
            _squares_kernel[(len(partial),)](noise, partial, size, parts, ACC=acc, BLOCK=block)
            _move_kernel[(len(partial),)](rows, noise, out, partial, size, parts, RADIUS=radius, ACC=acc, BLOCK=block)
    return alike(out, x)


def mean_abs_difference(clean: Sequence[Tensor], noisy: Sequence[Tensor], block: int = BLOCK) -> Tensor:
    """See `robplug_nsloss.kernels.reference.mean_abs_difference`."""
    return _means([clean, noisy], 0, block).sum()


def accumulate_signs(
    clean: Sequence[Tensor], noisy: Sequence[Tensor], sums: Sequence[Tensor], draw: int, block: int = BLOCK
) -> tuple[Tensor, list[Tensor]]:
    """See `robplug_nsloss.kernels.reference.accumulate_signs`."""
    signs = [torch.empty_like(layer, dtype=torch.int8) for layer in noisy]
    laid = [alike(total, layer) for total, layer in zip(sums, noisy, strict=True)]
    means = _means([clean, noisy, laid, signs], draw, block)
    for total, found in zip(sums, laid, strict=True):
        if found is not total:
            total.copy_(found)
    return means, signs


def mean_abs_difference_backward(
    g: Tensor, clean: Sequence[Tensor], noisy: Sequence[Tensor], both: bool, block: int = BLOCK
) -> list[Tensor]:
    """See `robplug_nsloss.kernels.reference.mean_abs_difference_backward`."""
    found = [[torch.empty_like(layer) for layer in noisy] for _ in range(1 + both)]
    for work in _shared_out([clean, noisy, *found], block):
        work.launch(_gradient_kernel, g, BOTH=both)
    return [grad for grads in found for grad in grads]


def add_signs(g: Tensor, signs: Tensor, weight: Tensor, block: int = BLOCK) -> Tensor:
    """See `robplug_nsloss.kernels.reference.add_signs`."""
    out, size, acc = torch.empty_like(g), g.numel(), _ACC[accumulator(g)]
    with torch.cuda.device_of(out):
        grid = (triton.cdiv(size, block),)
        _add_signs_kernel[grid](alike(g, g), alike(signs, g), out, weight, size, ACC=acc, BLOCK=block)
    return out


def _means(lists: Sequence[Sequence[Tensor]], draw: int, block: int) -> Tensor:
    """Returns the means of the layers' differences, (L,); writes sums and signs where lists has them."""
    noisy = lists[1]
    means = noisy[0].new_empty(len(noisy), dtype=accumulator(*noisy))
    for work in _shared_out(lists, block):
        partial = means.new_empty(work.programs, dtype=accumulator(work.example))
        work.launch(_difference_kernel, partial, ADD=draw > 0, WRITE=len(lists) > 2)
        work.finish(partial, means)
    return means


def _shared_out(lists: Sequence[Sequence[Tensor]], block: int) -> list[_Work]:
    """Returns the work on the layers of each dtype of the second list, ``noisy``."""
    dtypes = [layer.dtype for layer in lists[1]]
    groups = {dtype: [n for n, other in enumerate(dtypes) if other == dtype] for dtype in dtypes}
    return [_Work(numbers, lists, block) for numbers in groups.values()]


class _Work:
    """The layers that go through one launch.

    Attributes:
        example: a tensor of their dtype.
        programs: how many there are, each with one block of one layer.
    """

    def __init__(self, numbers: list[int], lists: Sequence[Sequence[Tensor]], block: int) -> None:
        self.example, self.block, self.layers = lists[1][numbers[0]], block, len(numbers)
        # held until the launch, as some are copies
        self.tensors = [[alike(some[number], lists[1][number]) for some in lists] for number in numbers]
        self.programs, rows = 0, []
        for number, tensors in zip(numbers, self.tensors, strict=True):
            rows.append([self.programs, tensors[1].numel(), number, *(tensor.data_ptr() for tensor in tensors)])
            self.programs += triton.cdiv(tensors[1].numel(), block)
        pinned = torch.tensor(rows, pin_memory=self.example.is_cuda)
        self.table = pinned.to(self.example.device, non_blocking=True)
        self.constants = {"COLUMNS": len(rows[0]), "ACC": _ACC[accumulator(self.example)]}

    def launch(self, kernel: Any, tensor: Tensor, **options: bool) -> None:
        """Launches a program for each block of each layer."""
        options["LAYERS"] = triton.next_power_of_2(self.layers)
        with torch.cuda.device_of(tensor):
            kernel[(self.programs,)](
                self.table, self.example, tensor, self.layers, **options, **self.constants, BLOCK=self.block
            )

    def finish(self, partial: Tensor, means: Tensor) -> None:
        """Writes the layers' means, given the sum of each program."""
        with torch.cuda.device_of(means):
            _means_kernel[(self.layers,)](self.table, partial, means, STEP=self.block, **self.constants, BLOCK=PARTIALS)

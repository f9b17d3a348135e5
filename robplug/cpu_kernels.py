"""A plugin's kernels for the CPU, where plain PyTorch makes passes too many: compiled by Numba, on PyTorch's threads.

Between two tasks PyTorch's threads wait by spinning; a second pool of them, such as Numba's own, would compete with the
first for the cores. So a kernel is handed to the OpenMP library that PyTorch has loaded, which takes some microseconds.
Where that has no ``GOMP_parallel``, as on macOS and Windows, a kernel runs on one thread.

A kernel is a function of words of 64 bits, which every thread calls to do its portion::

    @kernel
    def doubled(words):
        start, stop = portion_of_values(words[2])
        x, out = float32s(words[0], words[2]), float32s(words[1], words[2])
        for i in range(start, stop):
            out[i] = 2 * x[i]

    doubled(x.numel(), x, out, x.numel())
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from struct import Struct
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.caching import FunctionCache
from numba.extending import intrinsic
from torch import Tensor

GRAIN = 2**15  # values from which on another thread pays
LINE = 64  # values, at least a cache line: threads hardly ever write to the same one

FAST = {"contract", "reassoc", "nsz"}
"""For ``fastmath``: sums in any order, which is what vectors need; NaN and infinity keep their meaning."""
Words = Any
"""A pointer to the arguments' words."""

FLOAT, FLOAT_AS_INT = Struct("d").pack, Struct("q").unpack
WORDS = types.void(types.CPointer(types.int64))
CALLED_ALONE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
THE_ONLY_ONE = [ctypes.CFUNCTYPE(ctypes.c_int)(lambda answer=answer: answer) for answer in (0, 1, 0)]

thread = types.ExternalFunction("robplug_thread", types.int32())
threads = types.ExternalFunction("robplug_threads", types.int32())
barrier = types.ExternalFunction("robplug_barrier", types.void())
"""In a kernel: waits until all threads have come here, so that what they wrote can be read."""


class Kernel:
    """A compiled function; to be called with the number of values that it works on and then its arguments.

    Of a tensor it gets the address of its first value, of a float its bits. It is compiled when it is first called, and
    kept on disk where there is a place for it.
    """

    def __init__(self, function: Callable[[Any], None]) -> None:
        functools.update_wrapper(self, function)
        self._function = function

    def __call__(self, values: int, *arguments: Tensor | int | float) -> None:
        words = _words(arguments)
        wanted = min(torch.get_num_threads(), max(1, values // GRAIN))
        parallel, address = _parallel(), self._address
        if wanted == 1 or parallel is None:
            CALLED_ALONE(address)(ctypes.addressof(words))
        else:
            parallel(address, ctypes.addressof(words), wanted, 0)

    @functools.cached_property
    def _address(self) -> int:
        _parallel()
        if numba.config.DISABLE_JIT:
            raise RuntimeError("expected Numba's compiler, got NUMBA_DISABLE_JIT=1; unset it")
        compiler = functools.partial(numba.cfunc, WORDS, error_model="numpy", fastmath=FAST)
        try:
            self._forget_what_is_old()
            self._compiled = compiler(cache=True)(self._function)
        except (RuntimeError, OSError, EOFError, ImportError, UnpicklingError):  # no place, a full disk, a broken file
            self._compiled = compiler()(self._function)
        return int(self._compiled.address)

    def _forget_what_is_old(self) -> None:
        """Empties the cache if a file has changed whose functions may be inlined here: Numba looks at its own only."""
        code, cache = self._function.__code__, FunctionCache(self._function)
        file = Path(code.co_filename)
        sources = [Path(__file__), *file.parent.glob("*.py")]
        newest = max(source.stat().st_mtime_ns for source in sources)
        kept = Path(cache.cache_path).glob(f"{file.stem}.{code.co_qualname}-{code.co_firstlineno}.*.nbi")
        if any(index.stat().st_mtime_ns < newest for index in kept):
            cache.flush()


@functools.cache
def _parallel() -> Any:
    """Returns how threads are had to call a function, or None, having told what a kernel has to ask who it is."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    openmp = ctypes.CDLL(str(library)) if library.exists() else None  # with the symbols of what it was linked with
    parallel = getattr(openmp, "GOMP_parallel", None)
    theirs = "omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier"
    asked = [getattr(openmp, name) for name in theirs] if parallel else THE_ONLY_ONE
    for name, function in zip((thread, threads, barrier), asked, strict=True):
        llvmlite.binding.add_symbol(name.symbol, ctypes.cast(function, ctypes.c_void_p).value)
    if parallel:
        parallel.argtypes, parallel.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return parallel


def kernel(function: Callable[[Any], None]) -> Kernel:
    """Makes a kernel of a function of words that Numba can compile."""
    return Kernel(function)


@numba.njit
def portion(count: int) -> tuple[int, int]:
    """Returns where this thread's part of a number of things begins and ends."""
    share = -(-count // threads())
    start = min(count, thread() * share)
    return start, min(count, start + share)


@numba.njit
def portion_of_values(size: int) -> tuple[int, int]:
    """Returns where this thread's part of neighbouring values begins and ends."""
    start, stop = portion(-(-size // LINE))
    return start * LINE, min(size, stop * LINE)


@intrinsic
def _pointer(_context: Any, address: Any) -> Any:
    """Returns an address as a pointer."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.voidptr(types.int64), code


@intrinsic
def number(_context: Any, word: Any) -> Any:
    """Returns the float whose bits a word has."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(signature.return_type))

    return types.float64(types.int64), code


@intrinsic
def _fetch(_context: Any, address: Any) -> Any:
    """Asks for the cache line with an address, which need not be ours."""

    def code(_: Any, builder: Any, __: Any, args: Any) -> Any:
        byte, flag = ir.PointerType(ir.IntType(8)), ir.IntType(32)
        takes = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
        prefetch = cgutils.get_or_insert_function(builder.module, takes, "llvm.prefetch.p0")
        to_read, into_all_levels, data = flag(0), flag(3), flag(1)
        builder.call(prefetch, [builder.inttoptr(args[0], byte), to_read, into_all_levels, data])

    return types.void(types.int64), code


@numba.njit
def fetch(address: int, size: int) -> None:
    """Asks for the float32 values at an address, for a loop that comes to them some microseconds later.

    Of itself a processor fetches ahead within long rows of values, but hardly from one row to the next.
    """
    for line in range(address, address + 4 * size, 64):
        _fetch(line)


@numba.njit
def float32s(address: int, size: int) -> Any:
    """Returns the values of a float32 tensor, flat."""
    return numba.carray(_pointer(address), size, np.float32)


@numba.njit
def float64s(address: int, size: int) -> Any:
    """Returns the values of a float64 tensor, flat."""
    return numba.carray(_pointer(address), size, np.float64)


@numba.njit
def int8s(address: int, size: int) -> Any:
    """Returns the values of an int8 tensor, flat."""
    return numba.carray(_pointer(address), size, np.int8)


def _words(arguments: tuple[Any, ...]) -> Any:
    """Returns the words of a kernel's arguments; the tensors must live until it has run."""
    try:  # in one go: this is a part of the time of a small layer
        words = [
            a if type(a) is int else FLOAT_AS_INT(FLOAT(a))[0] if type(a) is float else a.data_ptr() or _refuse(a)
            for a in arguments
        ]
    except AttributeError:
        kinds = ", ".join(type(argument).__name__ for argument in arguments)
        raise TypeError(f"expected tensors, ints and floats, got {kinds}; convert what is something else") from None
    return (ctypes.c_int64 * len(words))(*words)


def _refuse(argument: Tensor) -> int:
    raise ValueError(f"expected a tensor with values in memory, got {type(argument).__name__} of {argument.shape}")

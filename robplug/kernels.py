"""A plugin's kernels as PyTorch operators: one schema, one check, plain PyTorch everywhere and Triton on CUDA.

A package of kernels has two modules: ``reference``, the definitions in plain PyTorch, and ``triton_impl``. Both have a
function for each operator, with its name and its arguments.
"""

from __future__ import annotations

import functools
import importlib
import re
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import Parameter


def operator(schema: str, reference: ModuleType, check: Callable[..., None], empty: Callable[..., Any]) -> Any:
    """Registers an operator as ``torch.ops.PACKAGE.NAME``, without a derivative.

    The reference runs on every device but CUDA, where ``triton_impl`` beside it does; where triton is not installed,
    the reference does there too, after a warning. The check goes before all of them and before the fake implementation,
    so that eager mode and ``torch.compile`` refuse the same arguments.

    Args:
        schema: name, arguments and results, such as ``"warp(Tensor x, Tensor flow) -> Tensor"``; an argument that is
            written to says so, such as ``Tensor(a!) sums`` or ``Tensor(a!)[] sums``.
        reference: the module ``reference`` of the package of kernels; the plugin's package is PACKAGE.
        check: raises where the arguments do not fit.
        empty: returns tensors with the shapes, dtypes and strides of the results.

    Returns:
        The operator, as `torch.library.custom_op` gives it; its ``register_autograd`` adds a derivative.
    """
    name, bracket, arguments = schema.partition("(")

    def plain(*args: Any) -> Any:
        check(*args)
        return getattr(reference, name)(*args)

    def cuda(*args: Any) -> Any:
        check(*args)
        return getattr(cuda_kernels(reference), name)(*args)

    def fake(*args: Any) -> Any:
        check(*args)
        return empty(*args)

    package = reference.__name__.partition(".")[0]
    written = re.findall(r"!\)\S*\s+(\w+)", arguments)
    made = custom_op(f"{package}::{name}", plain, mutates_args=written, schema=bracket + arguments)
    made.register_kernel("cuda", cuda)
    made.register_fake(fake)
    return made


def are_plain(*tensors: Tensor) -> bool:
    """Returns whether a kernel may read and write the memory of tensors, and of tensors made like them, on the CPU.

    It may not where they stand for something else: fake and other subclasses of tensors, transforms of functions,
    traces, compilation, and views that are negative or conjugate by a mark.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() or torch._C._len_torch_dispatch_stack():
        return False
    for tensor in tensors:  # all() of an expression would take twice as long
        if type(tensor) not in (Tensor, Parameter) or not tensor.is_cpu or tensor.layout != torch.strided:
            return False
        if tensor.is_neg() or tensor.is_conj() or tensor._is_zerotensor():
            return False
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # left over from a transform
            return False
    return torch._C._functorch.peek_interpreter_stack() is None


@functools.cache
def cpu_kernels(reference: ModuleType) -> ModuleType:
    """Returns ``numba_impl`` beside the reference, whose compiler takes half a second to import."""
    return importlib.import_module(f"{reference.__name__.rpartition('.')[0]}.numba_impl")


@functools.cache
def cuda_kernels(reference: ModuleType) -> ModuleType:
    """Returns ``triton_impl`` beside the reference, or, said aloud, the reference where triton is not installed."""
    kernels = reference.__name__.rpartition(".")[0]
    try:
        return importlib.import_module(f"{kernels}.triton_impl")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
    remedy = f"pip install {kernels.partition('.')[0].replace('_', '-')}[triton]"
    warnings.warn(f"triton is not installed, so plain PyTorch runs on CUDA, slower; {remedy}", stacklevel=2)
    return reference

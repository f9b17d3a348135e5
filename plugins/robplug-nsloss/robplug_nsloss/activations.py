"""Collecting the activations of a forward pass: of layers by name, or the logits and every ReLU-like output."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from robplug.errors import InputError
from robplug_nsloss.kernels.batch_norm import batch_norm
from robplug_nsloss.kernels.surrogate import relu

LOGITS = "logits"
"""The name of the model's output among its layers."""

RELU_LIKE = frozenset("relu relu6 leaky_relu prelu rrelu elu celu selu gelu silu mish softplus hardswish".split())
"""Functions whose outputs are collected where no layers are named, in-place ones too; hardtanh from 0 is relu6."""


Seen = Callable[[list[str], Tensor], None]
"""Is called with the names so far and the latest activation, while that is still in the cache."""


class Recorder(TorchFunctionMode):
    """What one forward pass has computed in the chosen layers, in the order of computation.

    A layer that is used several times has an activation for each use. Functions are seen as they are called, within
    modules or without; they are named after the module that calls them: ``layer1.0:relu``, and ``layer1.0:relu#2`` for
    its second call.

    Attributes:
        names: of the activations.
        tensors: the activations, with their graph; no later operation in place changes them.
    """

    def __init__(self, functions: bool, own: bool, seen: Seen | None) -> None:
        super().__init__()
        self._own, self._seen = own, seen
        self.names: list[str] = []
        self.tensors: list[Tensor] = []
        self._versions: list[int | None] = []
        self._uses: Counter[str] = Counter()
        self._modules: list[str] = []
        self._functions = functions

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls a function and keeps its result if it is ReLU-like."""
        kwargs = kwargs or {}
        if self._own and func is F.batch_norm:
            return batch_norm(*args, **kwargs)
        kind = _kind(getattr(func, "__name__", ""))
        written = _written(kind, args, kwargs)
        for tensor in written:
            self._save_from(tensor)
        if not self._functions or not kind.relu_like or not _is_relu_like(kind, args, kwargs):
            return func(*args, **kwargs)
        cheap = self._own and kind.plain == "relu" and len(args) == 1 and not written
        out = relu(args[0]) if cheap else func(*args, **kwargs)
        self.keep(f"{self._modules[-1] if self._modules else ''}:{kind.plain}".removeprefix(":"), out)
        return out

    def keep(self, name: str, out: Any) -> None:
        """Adds an activation; the very tensor that was added last is not added twice."""
        if not isinstance(out, Tensor):
            raise InputError(f"a tensor from the layer {name}", type(out).__name__, "name layers inside of it")
        self._uses.setdefault(name, 0)
        if self.tensors and out is self.tensors[-1]:
            return
        self._uses[name] += 1
        self.names.append(name if self._uses[name] == 1 else f"{name}#{self._uses[name]}")
        self.tensors.append(out)
        self._versions.append(_version(out))
        if self._seen is not None:
            self._seen(self.names, out)

    def met(self, name: str) -> bool:
        """Returns whether a layer was used, be it under another name as well."""
        return name in self._uses

    def enter(self, name: str) -> None:
        """Notes that the forward of a module begins."""
        self._modules.append(name)

    def leave(self) -> None:
        """Notes that it has ended."""
        self._modules.pop()

    def check(self) -> None:
        """Refuses activations that were changed in place by something that could not be foreseen.

        Raises:
            InputError: naming the layer.
        """
        for name, tensor, version in zip(self.names, self.tensors, self._versions, strict=True):
            if _version(tensor) != version:
                remedy = "make that operation out of place, or leave the layer out by naming others in `layers`"
                raise InputError("activations that nothing changes afterwards", f"{name} changed in place", remedy)

    def _save_from(self, written: Tensor) -> None:
        """Puts copies in the place of activations that are about to be overwritten."""
        for index, tensor in enumerate(self.tensors):
            if _memory(tensor) == _memory(written):
                self.tensors[index] = tensor.clone()
                self._versions[index] = _version(self.tensors[index])


@contextmanager
def recording(model: nn.Module, layers: Sequence[str] | None = None) -> Iterator[Recorder]:
    """Collects the activations of the forward pass that is made inside.

    Args:
        model: any module whose output is a tensor.
        layers: names of modules whose outputs are wanted, ``"logits"`` for the model's own; None means the logits and
            every output of a ReLU-like function (`RELU_LIKE`), wherever and however it is called.

    Raises:
        InputError: a layer does not exist, is not used or gives no tensor; there is no ReLU-like function; or an
            activation is changed in place in a way that cannot be foreseen.
    """
    with passes_of(model, layers) as one_pass, one_pass() as recorder:
        yield recorder


@contextmanager
def passes_of(
    model: nn.Module, layers: Sequence[str] | None
) -> Iterator[Callable[..., AbstractContextManager[Recorder]]]:
    """Gives what a pass is made inside of, again and again: `recording` for many passes with one set of hooks.

    It takes ``own``, for a pass that `sign_surrogate` alone is to differentiate, whose ReLUs and batch norm are its
    own, and ``seen``, see `Seen`.
    """
    wanted = wanted_modules(model, (LOGITS,) if layers is None else layers)
    now: list[Recorder] = []

    @contextmanager
    def one_pass(own: bool = False, seen: Seen | None = None) -> Iterator[Recorder]:
        recorder = Recorder(layers is None, own, seen)
        now.append(recorder)
        try:
            with recorder:
                yield recorder
        finally:
            now.remove(recorder)
        recorder.check()
        unused = [name for name in wanted if not recorder.met(name)]
        if layers is not None and unused:
            raise InputError("layers that the forward pass uses", ", ".join(map(repr, unused)), "leave them out")
        if layers is None and len(recorder.names) < 2 and recorder.names[-1:] in ([], [LOGITS]):
            raise InputError(f"ReLU-like layers ({', '.join(sorted(RELU_LIKE))})", _seen(model), _how_to_name(model))

    def enter(name: str) -> None:
        for recorder in now:
            recorder.enter(name)

    def leave() -> None:
        for recorder in now:
            recorder.leave()

    def keep(name: str, out: Any) -> None:
        for recorder in now:
            recorder.keep(name, out)

    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(lambda *_, name=name: enter(name)).remove)
            # also where the forward fails, in case the failure is caught
            stack.callback(module.register_forward_hook(lambda *_: leave(), always_call=True).remove)
        for name, module in wanted.items():
            stack.callback(module.register_forward_hook(lambda _, __, out, name=name: keep(name, out)).remove)
        yield one_pass


def wanted_modules(model: nn.Module, layers: Sequence[str]) -> dict[str, nn.Module]:
    """Returns the modules of these names.

    Raises:
        InputError: there is none of a name; the error lists near ones.
    """
    if isinstance(layers, str) or not layers:
        raise InputError("a list of names of layers, or None", repr(layers), _how_to_name(model))
    modules = {LOGITS: model, **dict(model.named_modules())}
    for name in layers:
        if name not in modules:
            near = difflib.get_close_matches(name, modules, n=3) or list(filter(None, modules))[:10]
            raise InputError(f"a layer of {type(model).__name__}", repr(name), f"there is {', '.join(near)}")
    return {name: modules[name] for name in layers}


class _Kind(NamedTuple):
    """What a function's name says: itself without the mark of writing in place, whether it writes, and is ReLU-like."""

    plain: str
    writes: bool
    relu_like: bool


def _kind(name: str) -> _Kind:
    plain = name.removesuffix("_")
    in_place = name.endswith("_") and not name.endswith("__")
    operator = name == "__setitem__" or (name.startswith("__i") and name not in ("__invert__", "__index__", "__int__"))
    return _Kind(plain, in_place or operator, plain in RELU_LIKE or plain == "hardtanh")


def _is_relu_like(kind: _Kind, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if kind.plain == "hardtanh":
        return bool((args[1] if len(args) > 1 else kwargs.get("min_val", -1.0)) == 0)
    return kind.relu_like


def _written(kind: _Kind, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Returns the tensors that a function may be about to overwrite; rather one too many."""
    writes = kind.writes or kwargs.get("inplace", False)
    for arg in args[1:]:
        writes = writes or arg is True  # some pass it by place
    first = args[:1] or (kwargs.get("input"),)
    written = [kwargs.get("out"), *(first if writes else ())]
    return [tensor for tensor in written if isinstance(tensor, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _seen(model: nn.Module) -> str:
    leaves = [type(part).__name__ for part in model.modules() if not list(part.children())]
    return f"a {type(model).__name__} of {', '.join(dict.fromkeys(leaves))}"


def _how_to_name(model: nn.Module) -> str:
    names = [name for name, _ in model.named_modules() if name]
    return f"name layers, as in layers={[*names[:10], LOGITS]}"

"""Finding residual additions and top-level blocks in a network."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _AvgPoolNd, _MaxPoolNd

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
ADDITIONS = (operator.add, operator.iadd, torch.add)


@dataclass(frozen=True)
class Addition:
    """A residual addition in a traced block.

    Attributes:
        node: the sum of two summands.
        shortcut: which of them, 0 or 1, has come through fewer convolutions.
    """

    node: fx.Node
    shortcut: int


@dataclass(frozen=True)
class Block:
    """A module that makes residual additions.

    Attributes:
        graph: what its forward does; its children are single nodes.
        additions: in the order in which they are made.
    """

    graph: fx.Graph
    additions: tuple[Addition, ...]


@dataclass
class Found:
    """What there is to erode.

    Attributes:
        residual: modules by name that make residual additions.
        blocks: names of the top-level blocks.
        untraced: names of modules with convolutions whose forward could not be looked into, and why.
    """

    residual: dict[str, Block] = field(default_factory=dict)
    blocks: list[str] = field(default_factory=list)
    untraced: dict[str, str] = field(default_factory=dict)


class OneModuleTracer(fx.Tracer):
    """Traces the forward of one module and of no module inside."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Returns True: whatever is called is one node."""
        return True


def find(model: nn.Module) -> Found:
    """Looks for residual additions and top-level blocks.

    A residual addition is a sum of two tensors with a common origin of which one has come through fewer convolutions
    than the other; that one is the shortcut. Every module's own forward is traced, with its children as they are, so
    that control flow elsewhere in the network is no hindrance. Blocks are the modules that make such additions and
    contain no other that does; where there are none, the outermost modules with two convolutions or more (stages of an
    Inception network, say); where there is but one of these, pooling layers, with which the blocks of a VGG end.
    """
    found = Found()
    for name, module in model.named_modules():
        if _convolutions(module) and not isinstance(module, (_ConvNd, *CONTAINERS)):
            _look_into(name, module, found)
    inner = [name for name in found.residual if name and not _contains_another(name, found.residual)]
    found.blocks = inner or _composites(model) or _poolings(model)
    return found


def _look_into(name: str, module: nn.Module, found: Found) -> None:
    if "forward" in vars(module):
        found.untraced[name] = "its forward is not that of its class"
        return
    try:
        graph = trace(module)
    except Exception as error:  # a user's forward may raise anything when no tensor comes
        found.untraced[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
        return
    additions = tuple(_additions(graph, module))
    # a buffer is replaced where a module moves to another device, and a graph would keep the old one
    buffers = [node.target for node in graph.nodes if node.op == "get_attr" and node.target in module._buffers]
    if additions and buffers:
        found.untraced[name] = f"its forward uses its own buffer {buffers[0]}"
    elif additions:
        found.residual[name] = Block(graph, additions)


def trace(module: nn.Module) -> fx.Graph:
    """Returns what the forward of a module does with its children; arguments with defaults have those.

    The module itself is not touched: what its forward assigns goes to a copy.
    """
    probe = copy.copy(module)
    probe._modules, probe._buffers = dict(module._modules), dict(module._buffers)
    _, *arguments = inspect.signature(type(module).forward).parameters.values()
    preset = {one.name: one.default for one in arguments if one.default is not inspect.Parameter.empty}
    graph = OneModuleTracer().trace(probe, concrete_args=preset or None)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node in inputs[len(arguments) - len(preset) :]:
        _erase(node)  # with the assertion of its value, which cannot be pickled: whoever gives one gets a TypeError
    for node in graph.nodes:
        node.type = None  # annotations that are strings cannot be pickled
    return graph


def _erase(node: fx.Node) -> None:
    """Erases a node and all that is made of it."""
    for user in list(node.users):
        _erase(user)
    node.graph.erase_node(node)


def _additions(graph: fx.Graph, module: nn.Module) -> Iterator[Addition]:
    for node in graph.nodes:
        if not _is_addition(node):
            continue
        one, other = (_origins(summand) for summand in node.args)
        first, second = (_convolutions_of(part, module) for part in (one - other, other - one))
        if one & other and first != second:
            yield Addition(node, shortcut=int(second < first))


def _is_addition(node: fx.Node) -> bool:
    by_name = node.op == "call_method" and node.target in ("add", "add_")
    by_function = node.op == "call_function" and node.target in ADDITIONS
    tensors = len(node.args) == 2 and all(isinstance(arg, fx.Node) for arg in node.args) and not node.kwargs
    return (by_name or by_function) and tensors


def _origins(node: Any) -> set[fx.Node]:
    """Returns a node and all that it was computed from."""
    seen: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        last = waiting.pop()
        if last not in seen:
            seen.add(last)
            waiting += last.all_input_nodes
    return seen


def _convolutions_of(nodes: set[fx.Node], module: nn.Module) -> int:
    calls = (str(node.target) for node in nodes if node.op == "call_module")
    return sum(_convolutions(module.get_submodule(name)) for name in calls)


def _convolutions(module: nn.Module) -> int:
    return sum(isinstance(part, _ConvNd) for part in module.modules())


def _contains_another(name: str, names: dict[str, Block]) -> bool:
    return any(other.startswith(f"{name}.") for other in names)


def _composites(model: nn.Module) -> list[str]:
    """Returns the outermost modules with two convolutions or more, of which there must be two or more."""
    names = list(_outermost(model, ""))
    while len(names) == 1:
        names = list(_outermost(model.get_submodule(names[0]), f"{names[0]}."))
    return names


def _outermost(module: nn.Module, prefix: str) -> Iterator[str]:
    for name, child in module.named_children():
        if type(child) in CONTAINERS:
            yield from _outermost(child, f"{prefix}{name}.")
        elif not isinstance(child, _ConvNd) and _convolutions(child) >= 2:
            yield f"{prefix}{name}"


def _poolings(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, _MaxPoolNd | _AvgPoolNd)]

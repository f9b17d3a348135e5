"""A network with erosions that shares all layers and weights with the one it was made from, which stays as it is."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import fx, nn

from robplug_ghost.erosion import ErodeAdd, ErodeOutput, Ghost
from robplug_ghost.sites import Block

RELUS = (F.relu, F.relu_, torch.relu, torch.relu_)


@dataclass
class Surgery:
    """Rebuilds a network around erosions.

    Modules on the way to an erosion are copied without their layers; everything else is the very same object.

    Attributes:
        ghost: shared by all erosions.
        skip: width of skip erosion.
        keep: probability of dropout erosion.
        residual: modules with residual additions to be eroded.
        shortcuts: modules whose output is a shortcut to be eroded.
        blocks: modules whose output undergoes dropout erosion.
        names: of all modules.
        lines: what was done, for people.
    """

    ghost: Ghost
    skip: float
    keep: float
    residual: dict[nn.Module, Block]
    shortcuts: list[nn.Module]
    blocks: list[nn.Module]
    names: dict[nn.Module, str]
    lines: list[str] = field(default_factory=list)
    _skips: int = 0
    _drops: int = 0
    _done: dict[nn.Module, nn.Module] = field(default_factory=dict)

    def rebuilt(self, module: nn.Module) -> nn.Module:
        """Returns the module with the erosions that belong inside and behind it."""
        if module not in self._done:
            self._done[module] = self._behind(module, self._inside(module))
        return self._done[module]

    def _inside(self, module: nn.Module) -> nn.Module:
        children = {name: None if child is None else self.rebuilt(child) for name, child in module._modules.items()}
        block = self.residual.get(module)
        if block is None and all(child is module._modules[name] for name, child in children.items()):
            return module
        twin = copy.copy(module)
        twin._modules = children
        if block is not None:
            self._erode_additions(twin, block, self.names[module])
        return twin

    def _erode_additions(self, twin: nn.Module, block: Block, name: str) -> None:
        """Gives a copied module a forward of its own; class, attributes, hooks and state stay those of the original."""
        for addition in block.additions:
            # looked up now: a summand may be an addition that has been replaced
            shortcut, residual = (addition.node.args[i] for i in (addition.shortcut, 1 - addition.shortcut))
            relu = _relu_after(addition.node, twin)
            erosion = ErodeAdd(self.ghost, self._skips, self.skip, relu is not None)
            target = f"ghost_erosion_{self._skips}"
            twin._modules[target] = erosion
            self._skips += 1
            with block.graph.inserting_before(addition.node):
                eroded = block.graph.call_module(target, (shortcut, residual))
            for replaced in (relu, addition.node):
                if replaced is not None:
                    replaced.replace_all_uses_with(eroded)
                    block.graph.erase_node(replaced)
            total = f"w * {shortcut} + {residual}"
            self.lines.append(f"skip erosion in {name or 'the network'}: {f'relu({total})' if relu else total}")
        # as an attribute and no child: its layers are those of the twin
        vars(twin)["forward"] = fx.GraphModule(twin, block.graph)

    def _behind(self, module: nn.Module, twin: nn.Module) -> nn.Module:
        if module in self.shortcuts:
            twin = ErodeOutput(twin, self.ghost, self._skips, skip=self.skip, keep=None)
            self._skips += 1
            self.lines.append(f"skip erosion of the shortcut {self.names[module]}")
        if module in self.blocks:
            twin = ErodeOutput(twin, self.ghost, self._drops, skip=None, keep=self.keep)
            self._drops += 1
            self.lines.append(f"dropout erosion after {self.names[module]}")
        return twin


def _relu_after(node: fx.Node, module: nn.Module) -> fx.Node | None:
    """Returns the ReLU that is all that becomes of a sum, or None."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    by_module = user.op == "call_module" and _is_plain_relu(module.get_submodule(str(user.target)))
    by_method = user.op == "call_method" and user.target in ("relu", "relu_")
    by_function = user.op == "call_function" and user.target in RELUS
    return user if by_module or by_method or by_function else None


def _is_plain_relu(module: nn.Module) -> bool:
    return type(module) is nn.ReLU and not (module._forward_hooks or module._forward_pre_hooks)

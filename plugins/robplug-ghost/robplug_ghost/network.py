"""Ghost networks: many networks by erosion of one."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robplug.errors import InputError
from robplug.targets import evaluation_mode
from robplug_ghost.erosion import Ghost
from robplug_ghost.sites import Found, find
from robplug_ghost.surgery import Surgery


class GhostNetwork(nn.Module):
    """A network whose shortcuts and blocks are eroded at random, in train and in eval mode: a ghost of it.

    Skip erosion multiplies each channel of a shortcut by its own w from U[1 - skip, 1 + skip] before the residual is
    added. Dropout erosion zeroes outputs of top-level blocks and divides what is kept by the probability ``dropout``
    to be kept. A ghost is a seed: the same seed is the same network, on every device, for every batch and every sample
    in it. Without ``ghosts`` each forward pass is by a new ghost, the next of a series (longitudinal ensemble). With K
    of them logits are the mean over the first K ghosts of the series (standard ensemble); with 1 it is always that one.

    The network is left as it is and shares layers and weights with its ghosts: moving or training one moves or trains
    the other (``copy.deepcopy`` it first, if it must not). Modules on the way to an erosion are copied without their
    layers. In a block with an eroded addition, code that asks for the mode does what it does in eval mode, whereas its
    layers follow theirs; arguments of its forward that have a default keep it and cannot be given.

    Differentiable: once, in x and in the parameters.

    Source: Li et al. 2020, Learning Transferable Adversarial Examples via Ghost Networks; Xie 2020 (dissertation),
        section 3.4.6.
    Differs: all samples of a batch meet the same ghost, where dropout layers elsewhere draw for each sample; a sample's
        result does so not depend on its neighbours.

    Args:
        model: any network; nothing in it is changed. Axis 1 of what is eroded holds the channels.
        skip: width of skip erosion, 0 to 1; 0 means none. The paper has 0.22 for ResNet-50, 0.16 for ResNet-101 and
            0.12 for ResNet-152.
        dropout: probability to be *kept* in dropout erosion, above 0 and up to 1; 1 means none. The paper has 0.994 and
            0.988.
        ghosts: None, or the number K.
        seed: of the series, 0 to 2**63 - 1; its first ghost has this seed.
        shortcuts: modules, or their names, whose output is a shortcut; None looks for residual additions.
        blocks: modules, or their names, after which dropout erosion works; None looks for top-level blocks.

    Raises:
        InputError: a number is out of range, a module is not in the network, or nothing to be eroded was found. A
            forward pass raises it where none of the erosions takes part.

    Example:
        >>> import torch
        >>> from robplug.zoo import resnet20
        >>> ghost = GhostNetwork(resnet20(), skip=0.22).eval()
        >>> x = torch.rand(2, 3, 32, 32)
        >>> torch.equal(ghost(x), ghost(x))
        False
        >>> ghost.found[0]
        'skip erosion in layer1.0: relu(w * pad + bn2)'
    """

    def __init__(
        self,
        model: nn.Module,
        skip: float = 0.0,
        dropout: float = 1.0,
        *,
        ghosts: int | None = None,
        seed: int = 0,
        shortcuts: Sequence[str | nn.Module] | None = None,
        blocks: Sequence[str | nn.Module] | None = None,
    ) -> None:
        super().__init__()
        _check(skip, dropout, ghosts)
        with evaluation_mode(model):
            found = find(model)
        residual = found.residual if shortcuts is None else {}
        outputs = _modules(model, shortcuts or (), "shortcuts")
        ends = _modules(model, found.blocks if blocks is None else blocks, "blocks")
        if skip and not (residual or outputs):
            what, remedy = "residual additions", "name the modules whose output is a shortcut: shortcuts=[...]"
            raise _nothing_found(what, model, found, remedy)
        if dropout < 1 and not ends:
            what, remedy = "top-level blocks", "name the modules with which one ends: blocks=[...]"
            raise _nothing_found(what, model, found, remedy)
        self.skip, self.dropout, self.ghosts = skip, dropout, ghosts
        self._ghost = Ghost(seed)
        surgery = Surgery(
            self._ghost,
            skip,
            dropout,
            residual={model.get_submodule(name): block for name, block in residual.items() if skip},
            shortcuts=outputs if skip else [],
            blocks=ends if dropout < 1 else [],
            names={module: name for name, module in model.named_modules()},
        )
        self.network = surgery.rebuilt(model)
        self.found = tuple(surgery.lines)
        self.untraced = found.untraced
        self.resample(seed)

    def forward(self, x: Tensor) -> Tensor:
        """Takes what the network takes; returns logits (N, C) of one ghost, or the mean logits of K."""
        if self.ghosts is None:
            self._ghost.advance()
            return self._logits(x)
        logits = []
        for number in range(self.ghosts):
            self._ghost.choose(number)
            logits.append(self._logits(x))
        return torch.stack(logits).mean(0)

    def _logits(self, x: Tensor) -> Tensor:
        before = self._ghost.erosions
        logits: Tensor = self.network(x)
        if self.found and self._ghost.erosions == before:
            remedy = "name modules that the forward pass calls: shortcuts=[...], blocks=[...]"
            raise InputError("an erosion that takes part in the forward pass", f"none of {len(self.found)}", remedy)
        return logits

    @property
    def seed(self) -> int:
        """The seed of the ghost of the last forward pass (of the last of K)."""
        return self._ghost.seed

    def resample(self, seed: int) -> None:
        """Begins the series of ghosts that a seed stands for, whose first ghost has this seed.

        Raises:
            InputError: the seed is not from 0 to 2**63 - 1.
        """
        self._ghost.restart(seed)

    reset = resample
    """The name under which `robplug.targets.Target.reset` asks for it."""

    def extra_repr(self) -> str:
        """Returns the settings, all that was found, and what could not be looked into."""
        settings = f"skip={self.skip:g}, dropout={self.dropout:g}, ghosts={self.ghosts}"
        untraced = [f"not looked into: {name or 'the network itself'} ({why})" for name, why in self.untraced.items()]
        return "\n".join([settings, *(self.found or ["nothing is eroded"]), *untraced])


def _check(skip: float, dropout: float, ghosts: int | None) -> None:
    if not 0 <= skip <= 1:
        raise InputError("a width of skip erosion from 0 to 1", skip, "the paper's is 0.22 for ResNet-50")
    if not 0 < dropout <= 1:
        raise InputError("a dropout above 0 and up to 1", dropout, "it is the probability to be kept, such as 0.994")
    if ghosts is not None and (isinstance(ghosts, bool) or not isinstance(ghosts, int) or ghosts < 1):
        raise InputError("ghosts to be a number >= 1, or None", repr(ghosts), "None draws a new ghost for each forward")


def _nothing_found(what: str, model: nn.Module, found: Found, remedy: str) -> InputError:
    reasons = [f"{name or 'the network itself'} could not be traced, {why}" for name, why in found.untraced.items()]
    return InputError(f"{what} to be eroded", "; ".join([f"none in {type(model).__name__}", *reasons]), remedy)


def _modules(model: nn.Module, given: Sequence[str | nn.Module], what: str) -> list[nn.Module]:
    """Returns the modules that are meant, which must be of the network."""
    named = dict(model.named_modules())
    own = set(named.values())
    modules = []
    for one in given:
        if isinstance(one, str) and one not in named:
            near = difflib.get_close_matches(one, named, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else "see model.named_modules()"
            raise InputError(f"{what} to name modules of the network", repr(one), hint)
        module = named[one] if isinstance(one, str) else one
        if module not in own:
            raise InputError(f"{what} to be modules of the network", f"another {type(module).__name__}")
        modules.append(module)
    return modules

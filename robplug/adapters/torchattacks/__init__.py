"""torchattacks: its attacks in robplug (inward.py), robplug's attacks in torchattacks (outward.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from torchattacks.attack import Attack


def attack(
    name: str, model: nn.Module, *, eps: float | None = None, norm: str | None = None, seed: int = 0, **params: Any
) -> Attack:
    """Makes a torchattacks attack of a robplug attack.

    Args:
        name: as in ``robplug list attacks``.
        model: maps images in [0, 1] to logits (normalised ones after ``set_normalization_used``).
        eps: radius on the scale [0, 1]; left out for an attack that looks for the smallest distance.
        norm: one that the attack serves; the first that it lists without.
        seed: of its random numbers; every call draws new ones.
        **params: the attack's own parameters.

    Returns:
        An attack to be called as any other of torchattacks, ``attack(x, y)``, with its targeted modes, its
        normalisation and its ``save``.

    Raises:
        UnknownNameError: no plugin has it.
        InputError: it has no such parameter, or needs to be fitted to a data set.
        ThreatError: it does not serve the norm, or no classification, or eps is missing or out of place.

    Example:
        >>> import torch
        >>> from robplug.adapters.torchattacks import attack
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
        >>> pgd = attack("robplug/pgd", net, eps=0.1, steps=5)
        >>> pgd(torch.rand(2, 1, 2, 2), torch.tensor([0, 1])).shape
        torch.Size([2, 1, 2, 2])
    """
    from robplug.adapters.torchattacks import outward

    return outward.attack(name, model, eps, norm, seed, params)

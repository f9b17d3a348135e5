"""Foolbox: its attacks and models in robplug (inward.py, targets.py), robplug's attacks in Foolbox (outward.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foolbox.attacks.base import Attack


def attack(name: str, *, norm: str | None = None, seed: int = 0, **params: Any) -> Attack:
    """Makes a Foolbox attack of a robplug attack.

    Args:
        name: as in ``robplug list attacks``.
        norm: one that the attack serves; the first that it lists without.
        seed: of its random numbers; every call draws new ones.
        **params: the attack's own parameters.

    Returns:
        An attack to be called as any other of Foolbox: ``attack(fmodel, x, criterion, epsilons=...)``; a minimal one
        for an attack that looks for the smallest distance, else one of fixed epsilon.

    Raises:
        UnknownNameError: no plugin has it.
        InputError: it has no such parameter, or needs to be fitted to a data set.
        ThreatError: it does not serve the norm, or no classification.

    Example:
        >>> import foolbox, torch
        >>> from robplug.adapters.foolbox import attack
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)).eval()
        >>> fmodel = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
        >>> x, y = torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
        >>> raw, clipped, is_adv = attack("robplug/pgd", norm="l2", steps=5)(fmodel, x, y, epsilons=[0.1, 0.5])
        >>> tuple(is_adv.shape)
        (2, 2)
    """
    from robplug.adapters.foolbox import outward

    return outward.attack(name, norm, seed, params)

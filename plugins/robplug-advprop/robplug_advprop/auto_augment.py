"""AutoAugment by torchvision, on the samples of a step."""

from __future__ import annotations

import torch
from torch import Tensor

from robplug.errors import InputError, RobplugError
from robplug.isolation import seeded_globals
from robplug.step import Step

POLICIES = ("imagenet", "cifar10", "svhn")


def check_policy(name: str) -> None:
    """Refuses a policy that there is not, and any where torchvision is not installed."""
    if name not in POLICIES:
        raise InputError(f"a policy of AutoAugment: {', '.join(POLICIES)}", repr(name), "an attack is given as a number")
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError as error:
        message = "AutoAugment needs the package torchvision, which is not installed: pip install torchvision"
        raise RobplugError(message) from error


def auto_augment(step: Step, policy: str) -> Tensor:
    """Returns the samples with a random sub-policy of AutoAugment applied to each, in 256 levels as the library works.

    Args:
        step: its samples are images, (N, 1 or 3, H, W).
        policy: ``"imagenet"``, ``"cifar10"`` or ``"svhn"``.

    Raises:
        InputError: the samples are no images.

    Source: Cubuk et al. 2019.
    """
    from torchvision.transforms import AutoAugment, AutoAugmentPolicy

    if step.x.dim() != 4 or step.x.shape[1] not in (1, 3):
        raise InputError("images of shape (N, 1 or 3, H, W) for AutoAugment", tuple(step.x.shape))
    low, high = step.bounds
    levels = ((step.x - low) / (high - low) * 255).round().clamp(0, 255).to(torch.uint8)
    change = AutoAugment(AutoAugmentPolicy(policy))
    with seeded_globals(step.rng.batch_seed()):  # the library draws from the global generators
        changed = torch.stack([change(image) for image in levels])
    return changed.to(step.x.dtype) / 255 * (high - low) + low

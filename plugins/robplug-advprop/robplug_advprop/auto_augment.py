"""AutoAugment by kornia, on the samples of a step."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from robplug.errors import InputError, RobplugError
from robplug.isolation import seeded_globals
from robplug.step import Step

POLICIES = ("imagenet", "cifar10", "svhn")


def check_policy(name: str) -> None:
    """Refuses a policy that there is not, and any where kornia is not installed."""
    if name not in POLICIES:
        raise InputError(
            f"a policy of AutoAugment: {', '.join(POLICIES)}", repr(name), "an attack is given as a number"
        )
    if importlib.util.find_spec("kornia") is None:
        message = "AutoAugment needs the package kornia, not installed: pip install 'robplug-advprop[autoaugment]'"
        raise RobplugError(message)


@torch.no_grad()
def auto_augment(step: Step, policy: str) -> Tensor:
    """Returns the samples, (N, C, H, W), with a random sub-policy of AutoAugment applied to each.

    Args:
        step: its samples are images, (N, 1 or 3, H, W); grey ones are augmented as colour, and one channel kept.
        policy: ``"imagenet"``, ``"cifar10"`` or ``"svhn"``.

    Raises:
        InputError: the samples are no images.

    Source: Cubuk et al. 2019, AutoAugment: Learning Augmentation Policies from Data.
    """
    from kornia.augmentation.auto import AutoAugment

    channels = step.x.shape[1]
    if step.x.dim() != 4 or channels not in (1, 3):
        raise InputError("images of shape (N, 1 or 3, H, W) for AutoAugment", tuple(step.x.shape))
    low, high = step.bounds
    images = ((step.x - low) / (high - low)).expand(-1, 3, -1, -1)
    change = AutoAugment(policy)
    with seeded_globals(step.rng.batch_seed()):  # the library draws from the global generators
        changed = torch.cat([change(image) for image in images.split(1)])  # one sub-policy a call
    return changed[:, :channels].clamp(0, 1) * (high - low) + low

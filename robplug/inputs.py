"""Checks that every attack makes of what it is given."""

from __future__ import annotations

import torch
from torch import Tensor

from robplug.errors import InputError, ThreatError
from robplug.targets import Target
from robplug.types import ThreatModel


def check_batch(target: Target, x: Tensor, y: Tensor | None, threat: ThreatModel, y_goal: Tensor | None) -> Tensor:
    """Checks a batch and returns the labels that the attack works with.

    Returns:
        (N,) int64: the goals of a targeted attack, else y, else the target's own predictions.

    Raises:
        InputError: a tensor has the wrong dtype, shape, device or values.
        ThreatError: bounds of threat and target differ, or goals and threat do not match.
    """
    if threat.bounds != target.bounds:
        raise ThreatError(f"expected the target's bounds {target.bounds}, got a threat with {threat.bounds}")
    _check_samples(target, x, threat.bounds)
    if threat.targeted != (y_goal is not None):
        have, want = ("goals", "targeted=False") if y_goal is not None else ("no goals", "targeted=True")
        raise ThreatError(f"expected y_goal exactly for a targeted threat, got {have} with {want}")
    labels = y if y_goal is None else y_goal
    if labels is None:
        return target.predict(x) if len(x) else torch.zeros(0, dtype=torch.int64, device=x.device)
    return _check_labels(target, x, labels, "y" if y_goal is None else "y_goal")


def _check_samples(target: Target, x: Tensor, bounds: tuple[float, float]) -> None:
    if not isinstance(x, Tensor):
        raise InputError("x to be a tensor", type(x).__name__, "torch.from_numpy makes one of an array")
    if not x.is_floating_point():
        remedy = "convert the images to float and scale them to the bounds"
        raise InputError("x of a floating-point dtype", f"{x.dtype}", remedy)
    if x.dim() < 2:
        raise InputError("x of shape (N, ...)", tuple(x.shape), "add a batch axis")
    if x.device != target.device:
        raise InputError(f"x on the model's device {target.device}", x.device, "move one of them")
    if len(x):
        low, high = (float(value) for value in x.detach().aminmax())
        # a bound such as 2.64 is less than its nearest float32, to which images are clamped
        lowest, highest = (float(torch.tensor(bound, dtype=torch.float32)) for bound in bounds)
        if not (lowest <= low and high <= highest):  # also false for nan
            raise InputError(f"x inside the bounds {bounds}", f"values from {low} to {high}")


def _check_labels(target: Target, x: Tensor, labels: Tensor, name: str) -> Tensor:
    if not isinstance(labels, Tensor):
        raise InputError(f"{name} to be a tensor", type(labels).__name__, "torch.from_numpy makes one of an array")
    if labels.shape != x.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
        remedy = "pass class numbers"
        raise InputError(
            f"{name} of shape ({len(x)},) and an integer dtype", f"{tuple(labels.shape)} {labels.dtype}", remedy
        )
    if len(labels) and (labels.min() < 0 or (target.classes is not None and labels.max() >= target.classes)):
        limit = "" if target.classes is None else f" and below {target.classes}"
        raise InputError(f"{name} not negative{limit}", f"{int(labels.min())} to {int(labels.max())}")
    return labels.to(device=x.device, dtype=torch.int64)

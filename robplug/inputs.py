"""Checks that every attack makes of what it is given."""

from __future__ import annotations

import torch
from torch import Tensor

from robplug.errors import InputError, ThreatError
from robplug.targets import Target
from robplug.tasks import task_of
from robplug.types import ThreatModel


def check_batch(target: Target, x: Tensor, y: Tensor | None, threat: ThreatModel, y_goal: Tensor | None) -> Tensor:
    """Checks a batch and returns the labels that the attack works with.

    Returns:
        The goals of a targeted attack, else y, else the target's own answers: (N,) int64, or for a task with several
        answers a sample what `robplug.tasks` says of its labels.

    Raises:
        InputError: a tensor has the wrong dtype, shape, device or values.
        ThreatError: bounds of threat and target differ, goals and threat do not match, or the task has no goals.
    """
    if threat.bounds != target.bounds:
        raise ThreatError(f"expected the target's bounds {target.bounds}, got a threat with {threat.bounds}")
    _check_samples(target, x, threat.bounds)
    if threat.targeted != (y_goal is not None):
        have, want = ("goals", "targeted=False") if y_goal is not None else ("no goals", "targeted=True")
        raise ThreatError(f"expected y_goal exactly for a targeted threat, got {have} with {want}")
    if y_goal is not None and target.task != "classification":
        raise ThreatError(f"expected no goals for {target.task}, got y_goal; attacks choose their own")
    labels, task = y if y_goal is None else y_goal, task_of(target)
    if labels is None:
        labels = task.labels(task.answer(target, x))
    task.check(labels, x, "y" if y_goal is None else "y_goal")
    return labels.to(x.device) if labels.is_floating_point() else labels.to(device=x.device, dtype=torch.int64)


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

"""Dense Adversary Generation on bare tensors: Algorithm 1, batched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from robplug.errors import InputError
from robplug_dag.kernels.ops import Rule, dense_adversary_grad, normalised_step
from robplug_dag.kernels.reference import accumulator, class_axis

Status = Literal["no targets", "converged", "no gradient", "steps used up"]
STATUSES: tuple[Status, ...] = get_args(Status)
NO_TARGETS, CONVERGED, NO_GRADIENT, USED_UP = range(len(STATUSES))
LogitsOf = Callable[[Tensor, Tensor], Tensor]
"""Images (n, ...) and their rows in the batch, (n,) int64, to logits of their targets."""


@dataclass(frozen=True)
class Record:
    """What Algorithm 1 did with each image of a batch.

    Attributes:
        r: the perturbation, the sum of all steps, as the images but float32 at least; not cut to the bounds.
        iterations: (N,) int64, number of steps.
        active: (N, steps) int64, number of active targets before each step; an image that has left the batch keeps its
            last number.
        status: of each image: ``"no targets"``; ``"converged"``, no target is active any more; ``"no gradient"``, the
            active targets' gradient is 0; ``"steps used up"``.
    """

    r: Tensor
    iterations: Tensor
    active: Tensor
    status: tuple[Status, ...]


@dataclass(frozen=True)
class Descent:
    """The parameters of Algorithm 1; see `dag`."""

    gamma: float = 0.5 / 255
    steps: int = 200
    rule: Rule = "label"
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not 0 < self.gamma < float("inf"):
            raise InputError("gamma > 0", self.gamma, "the paper's is .5 of 255 grey levels")
        if self.steps < 1:
            raise InputError("steps >= 1", self.steps, "the paper's are 200 for segmentation, 150 for detection")
        if self.rule not in ("label", "goal"):
            raise InputError("rule 'label' or 'goal'", repr(self.rule), "'label' is the paper's Algorithm 1")
        low, high = self.bounds
        if not low < high:
            raise InputError("bounds (low, high) with low < high", self.bounds)


def dag(
    logits_fn: Callable[[Tensor], Tensor],
    x: Tensor,
    labels: Tensor,
    goals: Tensor,
    *,
    gamma: float = 0.5 / 255,
    steps: int = 200,
    rule: Rule = "label",
    bounds: tuple[float, float] = (0.0, 1.0),
) -> tuple[Tensor, Record]:
    """Perturbs images until every target (a pixel, a proposal) is predicted as another class.

    Each step goes along the gradient of the sum over active targets of f_goal - f_label, divided by its largest
    absolute value in the image. Images leave the batch when none of their targets is active or their gradient is 0.

    Args:
        logits_fn: maps some of the images, (n, ...), to logits (n, C, H, W), or (n, R, C) for the same R proposals of
            each; differentiable, in evaluation mode. Never scaled to the labels' size here: that is the model's part.
        x: (N, ...) images inside the bounds.
        labels: (N, H, W) or (N, R) integers. A target is where label and goal are two different classes; where either
            is negative or both are equal, there is none. See `robplug_dag.leave_out` for background and ignored
            pixels.
        goals: likewise, the classes to reach; see `robplug_dag.random_goals`.
        gamma: length of a step, the largest change of a value, in units of x.
        steps: largest number of steps; the paper has 200 for segmentation and 150 for detection.
        rule: ``"label"``: a target is active while it is predicted as its label (Algorithm 1); ``"goal"``: until it is
            predicted as its goal (the authors' code).
        bounds: smallest and largest value of an image.

    Returns:
        (N, ...) x_adv, which is x + r cut to the bounds, and a `Record`.

    Raises:
        InputError: images, labels or parameters do not fit, or logits or gradients are not finite numbers.
        ValueError: the logits' shape or number of classes does not fit.

    Example:
        >>> import torch, robplug_dag
        >>> scores = lambda x: torch.cat([x, 1 - x], dim=1)
        >>> x, labels = torch.full((1, 1, 2, 2), 0.6), torch.zeros(1, 2, 2, dtype=torch.int64)
        >>> x_adv, record = robplug_dag.dag(scores, x, labels, 1 - labels, gamma=0.05)
        >>> record.status, record.iterations.tolist(), record.active[0, :4].tolist()
        (('converged',), [3], [4, 4, 4, 0])

    Source: Xie et al. 2017, Algorithm 1 (the dissertation's chapter 2, equations 2.1-2.3).
    Differs: the image that the network sees in each step is cut to the bounds, as the last one is in the paper; the sum
        r is not. A gradient of 0, by which the paper would divide, ends the image.
    """
    how = Descent(gamma, steps, rule, bounds)
    _check_images(x, how.bounds)
    for name, tensor in (("labels", labels), ("goals", goals)):
        if tensor.is_floating_point() or tensor.dtype == torch.bool or tensor.shape != labels.shape:
            expected = f"{name} of integers, of shape {tuple(labels.shape)}"
            raise InputError(expected, f"{tuple(tensor.shape)} of {tensor.dtype}", "give a class for each target")
    return descend(lambda images, _: logits_fn(images), x, labels.long(), goals.long(), how)


@dataclass(frozen=True)
class _Left:
    """The images that are still in the batch.

    Attributes:
        rows: (n,) int64, where they stand in the whole batch.
        x: (n, ...) clean images.
        now: (n, ...) what they are at the moment.
        r: (n, ...) their perturbations.
        labels: (n, ...) int64.
        goals: (n, ...) int64.
    """

    rows: Tensor
    x: Tensor
    now: Tensor
    r: Tensor
    labels: Tensor
    goals: Tensor

    def select(self, keep: Tensor) -> _Left:
        """Returns those where ``keep``, (n,) bool, is true."""
        return self if bool(keep.all()) else _Left(*(getattr(self, part.name)[keep] for part in fields(self)))


def descend(
    logits_of: LogitsOf, x: Tensor, labels: Tensor, goals: Tensor, how: Descent, start: Tensor | None = None
) -> tuple[Tensor, Record]:
    """Runs Algorithm 1, for logits that depend on which image it is; arguments and results are those of `dag`.

    ``start`` is the perturbation to go on from.
    """
    x = x.detach()
    r = torch.zeros_like(x, dtype=accumulator(x)) if start is None else start.clone()
    seen = x if start is None else (x + r).clamp_(*how.bounds).to(x.dtype)
    iterations = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    active = torch.zeros(len(x), how.steps, dtype=torch.int64, device=x.device)
    has_targets = ((labels >= 0) & (goals >= 0) & (labels != goals)).flatten(1).any(1)
    outcome = torch.where(has_targets, USED_UP, NO_TARGETS)
    left = _Left(torch.arange(len(x), device=x.device), x, seen, r, labels, goals).select(has_targets)
    for step in range(how.steps):
        if not len(left.rows):
            break
        gradient, counts = _gradient(logits_of, left, how.rule, step)
        active[left.rows, step:] = counts[:, None]
        going = counts > 0
        outcome[left.rows[~going]] = CONVERGED
        left, gradient = left.select(going), gradient if bool(going.all()) else gradient[going]
        moved, now, size = normalised_step(gradient, left.r, left.x, how.gamma, *how.bounds)
        _require(size.isfinite(), left.rows, "gradient", step)
        going = size > 0
        outcome[left.rows[~going]] = NO_GRADIENT
        left = replace(left, r=moved, now=now).select(going)
        r[left.rows], iterations[left.rows] = left.r, step + 1
    record = Record(r, iterations, active, tuple(STATUSES[number] for number in outcome.tolist()))
    return (x + r).clamp_(*how.bounds).to(x.dtype), record


def _gradient(logits_of: LogitsOf, left: _Left, rule: Rule, step: int) -> tuple[Tensor, Tensor]:
    """Returns the gradient of the active targets' sum, (n, ...), and their numbers, (n,)."""
    leaf = left.now.detach().requires_grad_()
    with torch.enable_grad():
        logits = logits_of(leaf, left.rows)
    if not logits.requires_grad:
        raise InputError("logits that depend on the images by autograd", "none", "drop detach() and no_grad()")
    upstream, counts = dense_adversary_grad(logits, left.labels, left.goals, rule)
    if not step:
        _check_classes(logits, left)
    _require(counts >= 0, left.rows, "logits", step)
    if not counts.any():
        return torch.zeros_like(leaf), counts
    (gradient,) = torch.autograd.grad(logits, leaf, upstream)
    return gradient, counts


def _check_images(x: Tensor, bounds: tuple[float, float]) -> None:
    if not x.is_floating_point() or x.dim() < 2:
        raise InputError("images (N, ...) of a floating dtype", f"{tuple(x.shape)} of {x.dtype}", "convert them")
    if x.numel():
        low, high = (float(value) for value in x.detach().aminmax())
        if not (bounds[0] <= low and high <= bounds[1]):  # also for NaN
            raise InputError(f"images inside {bounds}", f"values from {low} to {high}", "give their bounds")


def _check_classes(logits: Tensor, left: _Left) -> None:
    classes = logits.shape[class_axis(logits)]
    for name, tensor in (("labels", left.labels), ("goals", left.goals)):
        if tensor.max() >= classes:
            remedy = "robplug_dag.leave_out(labels, 255) leaves an ignored class out"
            raise InputError(f"{name} below the {classes} classes of the logits", int(tensor.max()), remedy)


def _require(fine: Tensor, rows: Tensor, what: str, step: int) -> None:
    if not fine.all():
        bad = rows[~fine].tolist()
        raise InputError(f"finite {what}", f"nan or inf for image {bad[0]} in step {step}", "leave the image out")

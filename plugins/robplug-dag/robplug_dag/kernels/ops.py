"""The kernels as PyTorch operators: schema, checks, shapes and devices.

The reference runs on every device but CUDA, where the Triton kernels do. One check serves the implementation and the
fake one, so that eager mode and ``torch.compile`` refuse the same arguments. Neither operator is differentiable.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor

from robplug.kernels import operator
from robplug_dag.kernels import checks, reference

Rule = Literal["label", "goal"]


def dense_adversary_grad(logits: Tensor, labels: Tensor, goals: Tensor, rule: Rule = "label") -> tuple[Tensor, Tensor]:
    """Returns the gradient of the sum over active targets of f_goal - f_label with respect to the logits f.

    It is 1 at an active target's goal, -1 at its label and 0 elsewhere. The prediction is the first class whose logit
    is largest, as in ``torch.argmax``. On CUDA logits are read once and the gradient is written once.

    Args:
        logits: (N, C, H, W), pixels as targets, or (N, R, C), proposals as targets; float16, bfloat16, float32 or
            float64, any strides, C >= 2.
        labels: (N, H, W) or (N, R) int64. A target is where label and goal are two different ones of the C classes;
            any other value, such as -1, says that there is none.
        goals: likewise, the classes to reach.
        rule: which targets are active: ``"label"``, those that are still predicted as their label, as in the paper's
            Algorithm 1; ``"goal"``, those that are not yet predicted as their goal, as in the authors' code.

    Returns:
        The gradient, with shape and dtype of the logits, channels last if they are and else contiguous; and (N,) int64,
        the number of active targets of each image, or -1 where one of its targets has a NaN among its logits.

    Differentiable: no; it is constant but for jumps.

    Raises:
        TypeError: logits are not of a floating dtype, labels or goals not int64.
        ValueError: shapes, devices, number of classes or rule do not fit.

    Source: Xie et al. 2017, equations 2.1 and 2.2 of the dissertation's chapter 2 (sign of 2.2), Algorithm 1.
    """
    if rule not in ("label", "goal"):
        raise ValueError(f"expected rule 'label' or 'goal', got {rule!r}; 'label' is the paper's Algorithm 1")
    return cast(tuple[Tensor, Tensor], _dense_adversary_grad(logits.detach(), labels, goals, rule == "goal"))


def normalised_step(
    gradient: Tensor, r: Tensor, x: Tensor, gamma: float, low: float, high: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the perturbation after a step of length gamma per image, and the image it makes.

    Convention:
        Step: r + gamma * g / max|g|, the maximum over all values of an image; where it is 0, r stays as it is.
        Image: x + r, cut to [low, high]; r itself is not cut.

    Args:
        gradient: (N, ...) g, with the dtype of x.
        r: (N, ...) the sum of all earlier steps, float32, or float64 where x has it.
        x: (N, ...) clean images, float16, bfloat16, float32 or float64; any strides, as the others.
        gamma: length of a step in units of x, above 0.
        low: smallest value of an image.
        high: largest value.

    Returns:
        The new r, the image with the dtype of x, both channels last if x is and else contiguous; and (N,) max|g| with
        the dtype of r: 0 says that the image did not move, NaN or infinity that its gradient was not finite.

    Differentiable: no.

    Raises:
        TypeError: x is not of a floating dtype.
        ValueError: shapes, dtypes, devices, gamma or bounds do not fit.

    Source: Xie et al. 2017, equation 2.3 of the dissertation's chapter 2.
    Differs: the paper has no guard for a gradient of 0.
    """
    args = (gradient.detach(), r.detach(), x.detach(), float(gamma), float(low), float(high))
    return cast(tuple[Tensor, Tensor, Tensor], _normalised_step(*args))


def _empty_gradient(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return reference.empty(logits), logits.new_empty(len(logits), dtype=torch.int64)


def _empty_step(gradient: Tensor, r: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return reference.empty(x, r.dtype), reference.empty(x), r.new_empty(len(x))


_dense_adversary_grad = operator(
    "dense_adversary_grad(Tensor logits, Tensor labels, Tensor goals, bool until_goal) -> (Tensor, Tensor)",
    reference,
    checks.dense_adversary_grad,
    _empty_gradient,
)
_normalised_step = operator(
    "normalised_step(Tensor gradient, Tensor r, Tensor x, float gamma, float low, float high)"
    " -> (Tensor, Tensor, Tensor)",
    reference,
    checks.normalised_step,
    _empty_step,
)

"""Which pixels or proposals are attacked, and the class that each is to get.

A label or goal of -1 says that there is nothing to attack.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robplug.errors import InputError
from robplug.rng import Rng


def leave_out(labels: Tensor, *classes: int) -> Tensor:
    """Returns the labels with -1 in the place of some classes, such as background and ignored pixels.

    Args:
        labels: (N, ...) integers.
        classes: what is not attacked; 0 and 255 for Pascal VOC.

    Returns:
        (N, ...) int64.

    Example:
        >>> import torch, robplug_dag
        >>> robplug_dag.leave_out(torch.tensor([[0, 3, 255, 7]]), 0, 255).tolist()
        [[-1, 3, -1, 7]]

    Source: Xie et al. 2017; section 2.3.3 of the dissertation, footnote 1: the background is not attacked.
    """
    listed = torch.tensor(classes, dtype=torch.int64, device=labels.device)
    return labels.long().masked_fill(torch.isin(labels.long(), listed), -1)


def random_permutations(classes: int, rng: Rng) -> Tensor:
    """Returns a random permutation of the classes without fixed point for each image, (N, classes) int64.

    Each is uniform among all of these: permutations are drawn until one has no fixed point, about e of them.

    Args:
        classes: their number, 2 or more.
        rng: N streams.

    Raises:
        InputError: fewer than two classes, of which no permutation moves all.
    """
    if classes < 2:
        raise InputError("two or more classes", classes, "one class has no permutation without fixed point")
    found = torch.empty(len(rng), classes, dtype=torch.int64)
    missing = torch.arange(len(rng))
    own, like = torch.arange(classes), torch.empty((), dtype=torch.float64)
    while len(missing):
        drawn = rng.uniform((classes,), like=like).argsort(1)
        fine = (drawn != own).all(1)
        found[missing[fine]] = drawn[fine]
        # who has one draws no more, so that nobody's stream depends on the neighbours
        missing, rng = missing[~fine], rng.select(~fine)
    return found


def random_goals(labels: Tensor, classes: int, rng: Rng) -> Tensor:
    """Returns pi(label), where pi is a random permutation of the classes without fixed point, one for each image.

    Args:
        labels: (N, ...) integers; negative ones keep no goal, -1.
        classes: their number, 2 or more, background included: it can be a goal.
        rng: N streams.

    Returns:
        (N, ...) int64 goals.

    Raises:
        InputError: labels, classes and streams do not fit.

    Example:
        >>> import torch, robplug_dag
        >>> from robplug.rng import Rng
        >>> robplug_dag.random_goals(torch.tensor([[0, 1, -1, 0]]), 2, Rng(0, [0])).tolist()
        [[1, 0, -1, 1]]

    Source: Xie et al. 2017; section 2.3.1 of the dissertation.
    """
    if len(labels) != len(rng):
        raise InputError(f"labels of {len(rng)} images, one for each stream", len(labels))
    return permuted_goals(labels, random_permutations(classes, rng).to(labels.device))


def permuted_goals(labels: Tensor, permutation: Tensor) -> Tensor:
    """Returns permutation[label] for each label.

    Args:
        labels: (N, ...) integers below C; negative ones keep no goal, -1.
        permutation: (C,) of all images or (N, C), int64; no label is its own goal.

    Returns:
        (N, ...) int64 goals.

    Raises:
        InputError: it is no permutation, it leaves a label where it is, or a label is no class.
    """
    each = permutation if permutation.dim() == 2 else permutation.expand(len(labels), -1)
    classes = each.shape[1]
    in_order = torch.arange(classes, device=each.device).expand(len(labels), -1)
    if each.shape[0] != len(labels) or not torch.equal(each.sort(1).values, in_order):
        expected = f"a permutation of the classes 0 to {classes - 1}, or one for each of {len(labels)} images"
        raise InputError(expected, permutation.tolist())
    if labels.numel() and labels.max() >= classes:
        remedy = "leave_out(labels, 255) marks a class as ignored"
        raise InputError(f"labels below {classes}, the size of the permutation", int(labels.max()), remedy)
    flat = labels.long().flatten(1)
    goals = each.gather(1, flat.clamp_min(0)).masked_fill(flat < 0, -1)
    stays = (goals == flat) & (flat >= 0)
    if stays.any():
        raise InputError("a permutation that moves every label", f"{int(flat[stays][0])} -> {int(flat[stays][0])}")
    return goals.view(labels.shape)

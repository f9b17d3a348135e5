"""How visible a perturbation is, and the control that shows what its arrangement does."""

from __future__ import annotations

from torch import Tensor

from robplug.errors import InputError
from robplug.rng import Rng


def perceptibility(r: Tensor, bounds: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    """Returns p = sqrt(mean over pixels k of |r_k|^2), where r_k has the channels of a pixel.

    Args:
        r: (N, C, ...) perturbations in units of the images.
        bounds: of the images; p is in units of their width, so that grey levels count from 0 to 1.

    Returns:
        (N,) float64.

    Differentiable: yes.

    Example:
        >>> import torch, robplug_dag
        >>> robplug_dag.perceptibility(torch.full((1, 3, 8, 8), 2.0), bounds=(0, 255)).item()  # sqrt(3) * 2 / 255
        0.013584...

    Source: Xie et al. 2017; section 2.3.5 of the dissertation.
    """
    low, high = bounds
    return r.double().square().flatten(2).sum(1).mean(1).sqrt() / (high - low)


def permuted(r: Tensor, rng: Rng) -> Tensor:
    """Returns perturbations with rows and columns in random order: the same values, another arrangement.

    Args:
        r: (N, C, H, W).
        rng: N streams; each image has one order of rows and one of columns, which its channels share.

    Raises:
        InputError: r is no batch of images, or has another number of images than rng has streams.

    Source: Xie et al. 2017, the columns PERM of the dissertation's tables 2.1-2.3.
    """
    if r.dim() != 4 or len(r) != len(rng):
        raise InputError(f"perturbations ({len(rng)}, C, H, W), one for each stream", tuple(r.shape))
    return rng.rearranged(r)

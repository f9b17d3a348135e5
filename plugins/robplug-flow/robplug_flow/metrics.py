"""How large and how rough a flow is."""

from __future__ import annotations

import torch
from torch import Tensor

from robplug_flow.units import Unit, to_normalized


def largest_displacement(flow: Tensor, unit: Unit = "pixel") -> Tensor:
    """Returns the largest absolute displacement along an axis, max |v|: the distance of the threat norms of flows.

    Args:
        flow: (N, 2, H, W) in pixels, (row, column).
        unit: of the result.

    Returns:
        (N,) with the dtype of the flow; NaN where the flow has one.
    """
    measured = flow if unit == "pixel" else to_normalized(flow)
    return measured.abs().flatten(1).amax(1)


def total_variation(flow: Tensor) -> Tensor:
    """Returns how rough a flow is: the sum of |v(p) - v(q)| (Euclidean) over all pairs of adjacent pixels p, q.

    It is half of the flow loss of stAdv with adjacent neighbours, which counts each pair twice, without the 1e-8 under
    the root: 0 for a flow that moves all pixels alike.

    Args:
        flow: (N, 2, H, W) in pixels, (row, column).

    Returns:
        (N,) in pixels, with the dtype of the flow.
    """
    down = torch.linalg.vector_norm(flow[:, :, 1:] - flow[:, :, :-1], dim=1)
    right = torch.linalg.vector_norm(flow[:, :, :, 1:] - flow[:, :, :, :-1], dim=1)
    total: Tensor = down.sum((1, 2)) + right.sum((1, 2))
    return total

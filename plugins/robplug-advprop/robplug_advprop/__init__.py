"""Mixture batch normalisation: surgery on networks, its kernel on bare tensors, and corruptions to measure with.

The names below are loaded when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from robplug.lazy import exports

if TYPE_CHECKING:
    from robplug_advprop.corruptions import corrupt, corruption_errors, corruption_names, mean_corruption_error
    from robplug_advprop.kernels.ops import mixture_batch_norm
    from robplug_advprop.layers import (
        MixtureBatchNorm1d,
        MixtureBatchNorm2d,
        MixtureBatchNorm3d,
        MixtureSyncBatchNorm,
    )
    from robplug_advprop.routing import route
    from robplug_advprop.statistics import keep_only
    from robplug_advprop.surgery import convert, convert_group_norm, drop_auxiliary

__all__ = [
    "MixtureBatchNorm1d",
    "MixtureBatchNorm2d",
    "MixtureBatchNorm3d",
    "MixtureSyncBatchNorm",
    "convert",
    "convert_group_norm",
    "corrupt",
    "corruption_errors",
    "corruption_names",
    "drop_auxiliary",
    "keep_only",
    "mean_corruption_error",
    "mixture_batch_norm",
    "route",
]

__getattr__, __dir__ = exports(
    __name__,
    {
        "corruptions": ["corrupt", "corruption_errors", "corruption_names", "mean_corruption_error"],
        "kernels.ops": ["mixture_batch_norm"],
        "layers": ["MixtureBatchNorm1d", "MixtureBatchNorm2d", "MixtureBatchNorm3d", "MixtureSyncBatchNorm"],
        "routing": ["route"],
        "statistics": ["keep_only"],
        "surgery": ["convert", "convert_group_norm", "drop_auxiliary"],
    },
)

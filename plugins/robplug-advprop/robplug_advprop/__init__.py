"""Mixture batch normalisation: surgery on networks, its kernel on bare tensors, and corruptions to measure with.

The names below are loaded when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

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

_HOMES = {
    "MixtureBatchNorm1d": "layers",
    "MixtureBatchNorm2d": "layers",
    "MixtureBatchNorm3d": "layers",
    "MixtureSyncBatchNorm": "layers",
    "convert": "surgery",
    "convert_group_norm": "surgery",
    "corrupt": "corruptions",
    "corruption_errors": "corruptions",
    "corruption_names": "corruptions",
    "drop_auxiliary": "surgery",
    "keep_only": "statistics",
    "mean_corruption_error": "corruptions",
    "mixture_batch_norm": "kernels.ops",
    "route": "routing",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'robplug_advprop' has no attribute {name!r}")
    return getattr(importlib.import_module(f"robplug_advprop.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

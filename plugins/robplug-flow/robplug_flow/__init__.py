"""Flow attacks and flow gradient regularisation, and their pieces on bare tensors.

The names below are loaded when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robplug_flow.kernels.ops import flow_gradient_penalty, flow_smoothness, warp

__all__ = ["flow_gradient_penalty", "flow_smoothness", "warp"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'robplug_flow' has no attribute {name!r}")
    from robplug_flow.kernels import ops

    return getattr(ops, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

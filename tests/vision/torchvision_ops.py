"""torchvision where its compiled operators are missing, as in its CPU wheels beside another build of torch.

Import `torchvision` from here. Where the operators exist, they are used; else stand-ins in plain PyTorch are registered
before the import: nms, on the CPU. qnms is declared only; roi_align has a fallback of torchvision's own.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch
from torch import Tensor

SIGNATURES = tuple(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" for name in ("nms", "qnms"))


def _nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    order = scores.argsort(descending=True, stable=True)
    areas = (dets[:, 2] - dets[:, 0]) * (dets[:, 3] - dets[:, 1])
    kept = []
    while len(order):
        first, order = order[0], order[1:]
        kept.append(first)
        low, high = dets[order, :2].maximum(dets[first, :2]), dets[order, 2:].minimum(dets[first, 2:])
        common = (high - low).clamp_min(0).prod(1)
        order = order[common / (areas[order] + areas[first] - common) <= iou_threshold]
    return torch.stack(kept) if kept else torch.zeros(0, dtype=torch.int64)


def _load() -> ModuleType:
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    for signature in SIGNATURES:
        LIBRARY.define(signature)
    LIBRARY.impl("nms", _nms, "CPU")
    found = importlib.import_module("torchvision")
    sys.modules["torchvision.extension"]._has_ops = lambda: True
    roi_align = sys.modules["torchvision.ops.roi_align"]  # has a fallback of its own, which it would compile
    roi_align._roi_align = roi_align._roi_align.__wrapped__
    return found


LIBRARY = torch.library.Library("torchvision", "FRAGMENT")  # it lives as long as its operators
torchvision = _load()

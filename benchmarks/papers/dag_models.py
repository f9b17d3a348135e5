"""torchvision's networks with VOC's twenty classes, for the experiment at the paper's size.

Files of weights, under the names that torchvision gives them, lie in ``models/`` under the environment variable
``ROBPLUG_DATA``; nothing is downloaded.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import detection, segmentation

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COCO_IDS = (5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72)
"""COCO's numbers of VOC's classes, in VOC's order."""
BACKGROUND = 0


class Normalised(nn.Module):
    """A segmentation network of torchvision for images from 0 to 1.

    Args:
        network: its images are normalised by the mean and deviation of ImageNet.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Takes (N, 3, H, W), returns (N, 21, H, W) logits."""
        return self.network((x - self.mean) / self.std)["out"]  # type: ignore[no-any-return]


def segmenter(name: str, weights: str) -> nn.Module:
    """Returns a trained segmentation network.

    Args:
        name: of a function of ``torchvision.models.segmentation``.
        weights: name of the file, trained on COCO with VOC's labels.
    """
    network = getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=21, aux_loss=True)
    network.load_state_dict(_read(weights))
    return Normalised(network)


def detector(name: str, weights: str) -> nn.Module:
    """Returns a trained Faster R-CNN whose last layer keeps the background and VOC's classes of COCO's 91.

    Args:
        name: of a function of ``torchvision.models.detection``.
        weights: name of the file, trained on COCO.
    """
    network = getattr(detection, name)(weights=None, weights_backbone=None)
    network.load_state_dict(_read(weights))
    head = network.roi_heads.box_predictor
    kept = torch.tensor([BACKGROUND, *COCO_IDS])
    for layer, values in ((head.cls_score, 1), (head.bbox_pred, 4)):
        rows = (kept[:, None] * values + torch.arange(values)).flatten()
        layer.weight, layer.bias = nn.Parameter(layer.weight.detach()[rows]), nn.Parameter(layer.bias.detach()[rows])
        layer.out_features = len(rows)
    return network  # type: ignore[no-any-return]


def _read(weights: str) -> dict[str, Any]:
    path = Path(os.environ["ROBPLUG_DATA"]) / "models" / weights
    return dict(torch.load(path, map_location="cpu", weights_only=True))

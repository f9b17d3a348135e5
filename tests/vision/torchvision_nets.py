"""Small untrained networks of torchvision's classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision_ops import torchvision

CLASSES = 4


class Backbone(nn.Module):
    """Two convolutions at stride 8."""

    out_channels = 8

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def network(kind: str, size: int = 64) -> nn.Module:
    from torchvision.models import detection
    from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator

    torch.manual_seed(0)
    if kind == "ssd":
        boxes, backbone = DefaultBoxGenerator([[2]], scales=[0.2, 0.4]), Backbone()
        backbone.out_channels = [8]  # one entry a map
        return detection.ssd.SSD(backbone, boxes, (size, size), CLASSES, detections_per_img=20).eval()
    anchors = AnchorGenerator(((12, 24),), ((1.0,),))
    sizes = {"min_size": size, "max_size": size}
    if kind == "retinanet":
        made = detection.RetinaNet(Backbone(), CLASSES, anchor_generator=anchors, score_thresh=0.001, **sizes)
        nn.init.normal_(made.head.classification_head.cls_logits.weight, std=10.0)  # it begins with the same everywhere
        return made.eval()
    pool = torchvision.ops.MultiScaleRoIAlign(["0"], 3, 2)
    made = detection.FasterRCNN(
        Backbone(),
        rpn_anchor_generator=anchors,
        box_roi_pool=pool,
        box_head=nn.Sequential(nn.Flatten(), nn.Linear(8 * 9, 16), nn.ReLU()),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(16, CLASSES),
        **sizes,
    )
    return made.eval()

"""A small detector in plain PyTorch, with two backbones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robplug.tasks import PADDING, overlap
from robplug.vision.boxes import decode, distinct, encode, rows, survivors
from robplug.vision.nets import conv_block
from robplug.vision.protocol import Proposals
from robplug.zoo import BasicBlock

STRIDE = 4
POSITIVE, NEGATIVE = 0.5, 0.4
HARD_NEGATIVES = 3
SCORE_THRESHOLD = 0.05
DETECTION_NMS = 0.5
CANDIDATES = 200
DETECTIONS = 100


class AnchorDetector(nn.Module):
    """Classifies square anchors at every fourth pixel and moves them onto objects.

    An anchor's classes compete with the background in one softmax. Proposals are all anchors, moved, of which
    non-maximum suppression drops those that overlap one with less background.

    Source: Liu et al. 2016 (SSD), section 2.2: matching, hard negatives, smooth L1.
    Differs: one feature map, square anchors; anchors that overlap an object by 0.4 to 0.5 are not trained.

    Args:
        backbone: images (N, 3, H, W) to maps (N, channels, H / 4, W / 4), rounded up.
        channels: of the maps.
        classes: number of classes, with the background.
        sizes: widths of the anchors, in pixels.

    Attributes:
        nms_threshold: proposals that overlap a better one by a larger IoU are dropped; may be set.
    """

    def __init__(self, backbone: nn.Module, channels: int, classes: int, sizes: Sequence[float]) -> None:
        super().__init__()
        self.classes, self.sizes, self.nms_threshold = classes, tuple(sizes), 0.7
        self.backbone = backbone
        self.head = conv_block(channels, channels)
        self.score = nn.Conv2d(channels, len(self.sizes) * classes, 1)
        self.move = nn.Conv2d(channels, len(self.sizes) * 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the logits (N, A, classes) and offsets (N, A, 4) of all anchors."""
        maps = self.head(self.backbone(x))
        scores, offsets = (head(maps).permute(0, 2, 3, 1) for head in (self.score, self.move))
        return scores.reshape(len(x), -1, self.classes), offsets.reshape(len(x), -1, 4)

    def proposals(self, x: Tensor) -> Proposals:
        """Returns the proposals, the one with least background first; see `robplug.vision.protocol.Detector`."""
        logits, offsets = self(x)
        return distinct(self._boxes(offsets.detach(), x), logits, self.nms_threshold)

    def rescore(self, x: Tensor, proposals: Proposals) -> Tensor:
        """Returns the logits of the same anchors in other images; see `robplug.vision.protocol.Detector`."""
        assert proposals.anchors is not None  # they are its own
        return rows(self(x)[0], proposals.anchors)

    @torch.no_grad()
    def detections(self, x: Tensor) -> Tensor:
        """Returns (N, 100, 6) rows x1, y1, x2, y2, score, label, the best first, filled up with rows of label -1.

        Of each class the 200 best boxes with a score of 0.05 or more go through non-maximum suppression at 0.5. All
        rows of an image are nan where the network gives nan: silence would pass for an empty image.
        """
        logits, offsets = self(x)
        scores, order = logits.softmax(2)[..., 1:].transpose(1, 2).topk(min(CANDIDATES, logits.shape[1]))
        boxes = rows(self._boxes(offsets, x)[:, None].expand(-1, self.classes - 1, -1, -1), order)
        kept = survivors(boxes.flatten(0, 1), (scores >= SCORE_THRESHOLD).flatten(0, 1), DETECTION_NMS)
        labels = torch.arange(1, self.classes, device=x.device)[:, None].expand_as(scores)
        labels = labels.masked_fill(~kept.view_as(scores), PADDING)
        found = torch.cat([boxes, scores[..., None], labels[..., None]], -1).flatten(1, 2)
        found[found[..., 5] == PADDING] = PADDING
        best = found[..., 4].argsort(dim=1, descending=True, stable=True)[:, :DETECTIONS]
        answers = F.pad(rows(found, best), (0, 0, 0, DETECTIONS - best.shape[1]), value=PADDING)
        lost = (logits.isnan().any(2) | offsets.isnan().any(2)).any(1)
        return answers.masked_fill(lost[:, None, None], torch.nan)

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns (N,) the loss of each image: cross-entropy and smooth L1 per matched anchor.

        Args:
            x: (N, 3, H, W).
            y: (N, M, 5) as in `robplug.data.Dataset`.
        """
        logits, offsets = self(x)
        anchors = self._anchors(x)
        labels, boxes = _match(anchors, y)
        entropy = F.cross_entropy(logits.transpose(1, 2).float(), labels.clamp_min(0), reduction="none")
        positive = labels > 0
        count = positive.sum(1)
        hardness = entropy.detach().masked_fill(labels != 0, -1.0).argsort(1, descending=True).argsort(1)
        counted = positive | ((labels == 0) & (hardness < HARD_NEGATIVES * count.clamp_min(1)[:, None]))
        aim = encode(torch.where(positive[..., None], boxes, anchors), anchors)
        place = F.smooth_l1_loss(offsets.float(), aim, reduction="none").sum(2)
        return ((entropy * counted).sum(1) + (place * positive).sum(1)) / count.clamp_min(1)

    def _boxes(self, offsets: Tensor, x: Tensor) -> Tensor:
        """Returns the moved anchors, (N, A, 4), inside the image."""
        height, width = x.shape[2:]
        limit = torch.tensor([width, height, width, height], device=x.device, dtype=offsets.dtype)
        return decode(offsets, self._anchors(x)).clamp_min(0).minimum(limit)

    def _anchors(self, x: Tensor) -> Tensor:
        """Returns the anchors, (A, 4): row by row, all sizes at a place."""
        down, across = (
            STRIDE * (torch.arange(-(-length // STRIDE), device=x.device, dtype=torch.float32) + 0.5)
            for length in x.shape[2:]
        )
        y, x_ = torch.meshgrid(down, across, indexing="ij")
        centre = torch.stack([x_, y], -1).view(-1, 1, 2)
        half = torch.tensor(self.sizes, device=x.device).view(1, -1, 1) / 2
        return torch.cat([centre - half, centre + half], -1).view(-1, 4)


def _match(anchors: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Returns what each anchor is to learn: labels (N, A), 0 the background and -1 nothing, and boxes (N, A, 4).

    An anchor learns the object that it overlaps most; an object's best anchor learns that object in any case.
    """
    real = y[..., 4] != PADDING
    iou = overlap(anchors[None], y[..., :4]).masked_fill(~real[:, None], 0.0)
    iou = iou.scatter_add(1, iou.argmax(1, keepdim=True), real[:, None].to(iou.dtype))
    best, which = iou.max(2)
    labels = y[..., 4].gather(1, which).long()
    labels = labels.masked_fill(best < POSITIVE, -1).masked_fill(best < NEGATIVE, 0)
    return labels, rows(y[..., :4], which)


def ssd_plain(classes: int = 4, width: int = 24, sizes: Sequence[float] = (12, 18, 25)) -> nn.Module:
    """Returns an untrained `AnchorDetector` on a chain of convolutions.

    Args:
        classes: number of classes, with the background.
        width: channels at half the size; twice as many follow.
        sizes: widths of the anchors, in pixels.
    """
    blocks = [conv_block(3, width, stride=2), conv_block(width, 2 * width, stride=2)]
    blocks += [conv_block(2 * width, 2 * width) for _ in range(2)]
    return AnchorDetector(nn.Sequential(*blocks), 2 * width, classes, sizes)


def ssd_residual(classes: int = 4, width: int = 16, sizes: Sequence[float] = (12, 18, 25)) -> nn.Module:
    """Returns an untrained `AnchorDetector` on residual blocks.

    Args:
        classes: number of classes, with the background.
        width: channels at half the size; twice as many follow.
        sizes: widths of the anchors, in pixels.
    """
    blocks = [BasicBlock(width, width, 1), BasicBlock(width, 2 * width, 2), BasicBlock(2 * width, 2 * width, 1)]
    return AnchorDetector(nn.Sequential(conv_block(3, width, stride=2), *blocks), 2 * width, classes, sizes)

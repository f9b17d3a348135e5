"""torchvision's segmentation networks and detectors as targets; what is used is the models' own methods."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robplug.errors import InputError
from robplug.targets import Target, evaluation_mode, from_module
from robplug.tasks import PADDING
from robplug.vision.boxes import distinct, rows
from robplug.vision.protocol import Proposals

CANDIDATES = 1000


class Logits(nn.Module):
    """A segmentation network that answers with a mapping: its logits, ``"out"``.

    Args:
        module: such as torchvision's FCN, DeepLabV3 and LRASPP, which upsample to the size of the images themselves.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """Takes (N, 3, H, W), returns (N, C, H, W)."""
        return self.module(x)["out"]  # type: ignore[no-any-return]


class TorchvisionDetector(nn.Module):
    """A detector with torchvision's interface: a list of images in, a list of mappings out, losses in train mode.

    Args:
        module: the detector.
        scale: images are divided by it first.
    """

    module: Any  # a torchvision model, whose methods and parts mypy does not know

    def __init__(self, module: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        self.module, self.scale = module, scale

    @torch.no_grad()
    def detections(self, x: Tensor) -> Tensor:
        """Returns (N, D, 6) rows x1, y1, x2, y2, score, label as the detector sorts them, filled up with label -1."""
        with evaluation_mode(self.module):
            found = self.module(self._images(x))
        parts = [torch.cat([one["boxes"], one["scores"][:, None], one["labels"][:, None]], 1) for one in found]
        return _padded(parts)

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns (N,) the sum of the losses that the detector has for each image alone.

        Where it draws which anchors and proposals count, it draws from the global generator. Batch norm and dropout
        are in the mode in which they are.

        Args:
            x: (N, 3, H, W).
            y: (N, M, 5) as in `robplug.data.Dataset`.
        """
        real = [boxes[boxes[:, 4] != PADDING] for boxes in y]
        targets = [{"boxes": boxes[:, :4], "labels": boxes[:, 4].long()} for boxes in real]
        with _asked_for_losses(self.module):
            each = [self.module([image], [target]) for image, target in zip(self._images(x), targets, strict=True)]
        return torch.stack([torch.stack(list(losses.values())).sum() for losses in each])

    def _images(self, x: Tensor) -> list[Tensor]:
        return list(x / self.scale if self.scale != 1.0 else x)

    def _features(self, x: Tensor) -> tuple[Any, dict[str, Tensor]]:
        images, _ = self.module.transform(self._images(x))
        features = self.module.backbone(images.tensors)
        return images, {"0": features} if isinstance(features, Tensor) else features


class TwoStageDetector(TorchvisionDetector):
    """Faster R-CNN: proposals are those of its region proposal network, logits those of its box head."""

    @property
    def nms_threshold(self) -> float:
        """IoU above which the region proposal network drops the weaker of two proposals; may be set."""
        return float(self.module.rpn.nms_thresh)

    @nms_threshold.setter
    def nms_threshold(self, threshold: float) -> None:
        self.module.rpn.nms_thresh = threshold

    def proposals(self, x: Tensor) -> Proposals:
        """Returns the proposals and the logits of their classes; see `robplug.vision.protocol.Detector`."""
        with evaluation_mode(self.module):
            images, features = self._features(x)
            boxes, _ = self.module.rpn(images, features)
            logits = self._classified(features, boxes, images)
        counts = [len(part) for part in boxes]
        sized = [part * _ratio(x, size) for part, size in zip(boxes, images.image_sizes, strict=True)]
        valid = torch.arange(max(counts), device=x.device) < torch.tensor(counts, device=x.device)[:, None]
        return Proposals(_padded(sized).detach(), _padded(list(logits.split(counts))), valid)

    def rescore(self, x: Tensor, proposals: Proposals) -> Tensor:
        """Returns the logits of the same boxes in other images; see `robplug.vision.protocol.Detector`."""
        with evaluation_mode(self.module):
            images, features = self._features(x)
            pairs = zip(proposals.boxes, images.image_sizes, strict=True)
            logits = self._classified(features, [boxes / _ratio(x, size) for boxes, size in pairs], images)
        return logits.view(*proposals.valid.shape, -1)

    def _classified(self, features: dict[str, Tensor], boxes: list[Tensor], images: Any) -> Tensor:
        """Returns the logits of all boxes of all images, one after another."""
        heads = self.module.roi_heads
        pooled = heads.box_roi_pool(features, boxes, images.image_sizes)
        return heads.box_predictor(heads.box_head(pooled))[0]  # type: ignore[no-any-return]


class OneStageDetector(TorchvisionDetector):
    """RetinaNet and SSD: proposals are the 1000 anchors with least background, moved, that do not overlap too much.

    Neither has a proposal stage, so the suppression among proposals is ours; that among detections is their own. The
    classes of RetinaNet do not compete: its background gets the logit 0, so that it is the largest where no class is
    likelier than not.

    Args:
        module: the detector.
        scale: images are divided by it first.

    Attributes:
        nms_threshold: proposals that overlap one with less background by a larger IoU are dropped; may be set.
    """

    def __init__(self, module: nn.Module, scale: float = 1.0) -> None:
        super().__init__(module, scale)
        self.nms_threshold = 0.7

    def proposals(self, x: Tensor) -> Proposals:
        """Returns the proposals and the logits of their classes; see `robplug.vision.protocol.Detector`."""
        with evaluation_mode(self.module):
            images, maps, answers, logits = self._answers(x)
            anchors = self.module.anchor_generator(images, maps)
        coder = self.module.box_coder
        pairs = zip(answers["bbox_regression"].detach(), anchors, images.image_sizes, strict=True)
        boxes = torch.stack([coder.decode_single(*pair) * _ratio(x, size) for *pair, size in pairs])
        best = (-logits.detach().softmax(2)[..., 0]).topk(min(CANDIDATES, boxes.shape[1])).indices
        limit = torch.tensor(x.shape[2:], device=x.device, dtype=boxes.dtype).flip(0).repeat(2)
        placed = rows(boxes, best).clamp_min(0).minimum(limit)
        return distinct(placed, rows(logits, best), self.nms_threshold, best)

    def rescore(self, x: Tensor, proposals: Proposals) -> Tensor:
        """Returns the logits of the same anchors in other images; see `robplug.vision.protocol.Detector`."""
        assert proposals.anchors is not None  # they are its own
        with evaluation_mode(self.module):
            return rows(self._answers(x)[3], proposals.anchors)

    def _answers(self, x: Tensor) -> tuple[Any, list[Tensor], Any, Tensor]:
        """Returns the images as the network sees them, its maps, what its head says, and the logits of all anchors."""
        images, features = self._features(x)
        maps = list(features.values())
        answers = self.module.head(maps)
        logits = answers["cls_logits"]
        return images, maps, answers, F.pad(logits[..., 1:], (1, 0)) if _is(self.module, "RetinaNet") else logits


def from_segmentation(model: nn.Module, **options: Any) -> Target:
    """Makes a Target of a torchvision segmentation network.

    Args:
        model: gives ``{"out": logits}``; normalised images, if it wants them, come from ``transform``.
        **options: those of `robplug.targets.from_module`.
    """
    return from_module(Logits(model), **_of("segmentation", options))


def from_detector(model: nn.Module, **options: Any) -> Target:
    """Makes a Target of a torchvision Faster R-CNN, RetinaNet or SSD, which normalises images itself.

    Args:
        model: neither its modes nor anything else of it is changed.
        **options: those of `robplug.targets.from_module`, but for ``transform`` and ``backward``.

    Raises:
        InputError: it wants masks or key points, or options contradict each other.
    """
    return from_module(_wrapped(model), **_of("detection", options))


def from_art_detector(estimator: Any, **options: Any) -> Target:
    """Makes a Target of an ART ``PyTorchObjectDetector`` or ``PyTorchFasterRCNN`` around a torchvision detector.

    Args:
        estimator: its ``clip_values`` are the bounds; images are divided by the upper one, as it does.
        **options: those of `robplug.targets.from_module`, but for ``bounds``.

    Raises:
        InputError: it has preprocessing of its own or channels last, or the detector is of another kind.
    """
    if "bounds" in options:
        raise InputError("the estimator's own clip_values", f"bounds={options['bounds']}", "leave bounds out")
    if estimator.preprocessing_operations:
        raise InputError("an estimator without preprocessing", repr(estimator.preprocessing_operations))
    if not estimator.channels_first:
        raise InputError("an estimator with channels_first=True", False)
    low, high = (0.0, 1.0) if estimator.clip_values is None else (float(value) for value in estimator.clip_values)
    scale = 1.0 if estimator.clip_values is None else high
    return from_module(_wrapped(estimator.model, scale), bounds=(low, high), **_of("detection", options))


def _wrapped(model: nn.Module, scale: float = 1.0) -> TorchvisionDetector:
    if _is(model, "FasterRCNN"):
        heads: Any = model.roi_heads
        if heads.has_mask() or heads.has_keypoint():
            raise InputError("a detector of boxes alone", f"a {type(model).__name__}", "use its Faster R-CNN")
        return TwoStageDetector(model, scale)
    if _is(model, "RetinaNet", "SSD"):
        return OneStageDetector(model, scale)
    raise InputError("a FasterRCNN, RetinaNet or SSD of torchvision", f"a {type(model).__name__}")


def _of(task: str, options: dict[str, Any]) -> dict[str, Any]:
    if options.get("task", task) != task:
        raise InputError(f"task={task!r} of this model", repr(options["task"]))
    return {**options, "task": task}


def _is(model: nn.Module, *names: str) -> bool:
    return any(base.__name__ in names for base in type(model).__mro__)


@contextmanager
def _asked_for_losses(model: nn.Module) -> Iterator[None]:
    """Puts the parts that decide between losses and detections into train mode, and no layer."""
    parts = [
        part for part in (model, getattr(model, "rpn", None), getattr(model, "roi_heads", None)) if part is not None
    ]
    modes = [part.training for part in parts]
    for part in parts:
        part.training = True
    try:
        yield
    finally:
        for part, mode in zip(parts, modes, strict=True):
            part.training = mode


def _ratio(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns what turns boxes in a resized image of some size into boxes in x, (4,)."""
    height, width = (mine / theirs for mine, theirs in zip(x.shape[2:], size, strict=True))
    return torch.tensor([width, height, width, height], device=x.device)


def _padded(parts: list[Tensor]) -> Tensor:
    """Returns (N, largest R, K) of N tensors (R, K), filled up with -1."""
    return nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=PADDING)

"""The hooks of segmentation and detection."""

from __future__ import annotations

from robplug.hookspecs import hookimpl
from robplug.types import DatasetSpec, TargetSpec


@hookimpl
def robplug_targets() -> list[TargetSpec]:
    """Small networks for the shapes, untrained, and what makes targets of torchvision's networks."""
    models = "torchvision.models"
    return [
        TargetSpec(
            name="torchvision/segmentation",
            make="robplug.vision.torchvision_models:from_segmentation",
            summary="an FCN, DeepLabV3 or LRASPP of torchvision",
            accepts=(
                f"{models}.segmentation._utils._SimpleSegmentationModel",
                f"{models}.segmentation.lraspp.LRASPP",
            ),
            task="segmentation",
        ),
        TargetSpec(
            name="torchvision/detection",
            make="robplug.vision.torchvision_models:from_detector",
            summary="a Faster R-CNN, RetinaNet or SSD of torchvision",
            accepts=(
                f"{models}.detection.faster_rcnn.FasterRCNN",
                f"{models}.detection.retinanet.RetinaNet",
                f"{models}.detection.ssd.SSD",
            ),
            task="detection",
        ),
        TargetSpec(
            name="art/object-detector",
            make="robplug.vision.torchvision_models:from_art_detector",
            summary="an ART PyTorchObjectDetector or PyTorchFasterRCNN",
            accepts=("art.estimators.object_detection.pytorch_object_detector.PyTorchObjectDetector",),
            task="detection",
        ),
        TargetSpec(
            name="robplug/fcn-small",
            make="robplug.vision.nets:fcn_small",
            summary="fully convolutional segmentation network, untrained",
            source="Long, Shelhamer and Darrell 2015, section 4.2",
            params={"classes": 4, "width": 24},
            task="segmentation",
        ),
        TargetSpec(
            name="robplug/unet-small",
            make="robplug.vision.nets:unet_small",
            summary="U-Net of three levels for segmentation, untrained",
            source="Ronneberger, Fischer and Brox 2015, section 2",
            params={"classes": 4, "width": 12},
            task="segmentation",
        ),
        TargetSpec(
            name="robplug/ssd-plain",
            make="robplug.vision.detector:ssd_plain",
            summary="anchor detector on a chain of convolutions, untrained",
            source="Liu et al. 2016, section 2.2",
            params={"classes": 4, "width": 24, "sizes": (12, 18, 25)},
            task="detection",
        ),
        TargetSpec(
            name="robplug/ssd-residual",
            make="robplug.vision.detector:ssd_residual",
            summary="anchor detector on residual blocks, untrained",
            source="Liu et al. 2016, section 2.2",
            params={"classes": 4, "width": 16, "sizes": (12, 18, 25)},
            task="detection",
        ),
    ]


@hookimpl
def robplug_datasets() -> list[DatasetSpec]:
    """The synthetic shapes, and readers of the user's files."""
    files: dict[str, object] = {"split": "val", "root": None, "size": None, "samples": None}
    shapes: dict[str, object] = {
        "split": "test",
        "samples": 500,
        "size": 64,
        "seed": 0,
        "classes": 4,
        "contrast": 0.04,
        "noise": 0.01,
    }
    return [
        DatasetSpec(
            name="shapes",
            make="robplug.vision.shapes:shapes",
            summary="synthetic shapes told apart by faint colours, with pixel labels",
            params=shapes,
            task="segmentation",
        ),
        DatasetSpec(
            name="shapes-boxes",
            make="robplug.vision.shapes:shapes_boxes",
            summary="the same images with boxes",
            params=shapes,
            task="detection",
        ),
        DatasetSpec(
            name="voc-segmentation",
            make="robplug.vision.files:voc_segmentation",
            summary="images and pixel labels in folders of VOC's form",
            source="Everingham et al. 2010",
            params={**files, "classes": None},
            task="segmentation",
        ),
        DatasetSpec(
            name="voc-detection",
            make="robplug.vision.files:voc_detection",
            summary="images and boxes in folders of VOC's form",
            source="Everingham et al. 2010",
            params={**files, "classes": None},
            task="detection",
        ),
        DatasetSpec(
            name="coco-detection",
            make="robplug.vision.files:coco_detection",
            summary="images and boxes from annotations of COCO's form",
            source="Lin et al. 2014",
            params={**files, "split": "val2017"},
            task="detection",
        ),
    ]

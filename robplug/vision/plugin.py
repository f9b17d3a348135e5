"""The hooks of segmentation and detection."""

from __future__ import annotations

from robplug.hookspecs import hookimpl
from robplug.types import DatasetSpec, TargetSpec


@hookimpl
def robplug_targets() -> list[TargetSpec]:
    """Small networks for the shapes, untrained."""
    return [
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
    """The synthetic shapes."""
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
    ]

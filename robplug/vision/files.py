"""Images with pixel labels and boxes from the user's files: folders in the form of VOC, annotations in that of COCO."""

from __future__ import annotations

import contextlib
import io
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from robplug.data import Dataset
from robplug.data_files import read_image, root_of
from robplug.errors import InputError, RobplugError
from robplug.vision.batches import Bytes, Sample, batch_boxes, batch_pixels

VOC_SOURCE = "the VOC page has an archive with JPEGImages, SegmentationClass, Annotations and ImageSets"
COCO_SOURCE = "the COCO page has the images, and annotations/instances_<split>.json"
VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


def voc_segmentation(
    split: str = "val",
    root: str | None = None,
    size: int | None = None,
    samples: int | None = None,
    classes: Sequence[str] | None = None,
) -> Dataset:
    """Images and pixel labels from a folder in the form of VOC.

    Args:
        split: a list of names, ``ImageSets/Segmentation/<split>.txt``.
        root: the folder that has ``JPEGImages`` and ``SegmentationClass``, or one that holds it in ``VOC2012`` or
            ``VOCdevkit/VOC2012``; None means the environment variable ``ROBPLUG_DATA``.
        size: height and width that all images are brought to: the longer side becomes ``size``, and grey fills up what
            is below or to the right, its label being 255. None takes images as they are, all of one size.
        samples: how many to read, from the start of the list; None reads all.
        classes: names of the classes from label 1 on; None means the twenty of VOC.

    Returns:
        x (N, 3, H, W) in [0, 1]; y (N, H, W), 255 where the file says so.

    Raises:
        InputError: a file is missing or damaged, a label is none of the classes, or sizes differ without ``size``.

    Source: Everingham et al. 2010, The PASCAL Visual Object Classes (VOC) Challenge; the development kit's form.
    """
    top, names = _voc(root, "Segmentation", split, samples)
    labels = ("background", *(VOC_CLASSES if classes is None else classes))
    parts = []
    for name in names:
        pixels = _read_mask(path := top / "SegmentationClass" / f"{name}.png")
        if (strange := pixels[(pixels >= len(labels)) & (pixels != 255)]).size:
            raise InputError(f"labels below {len(labels)}, or 255, in {path}", int(strange[0]), "see classes=")
        parts.append(Sample(_image(top / "JPEGImages" / f"{name}.jpg"), path, pixels=pixels))
    x, y = batch_pixels(parts, size)
    return Dataset("voc-segmentation", x, y, class_names=labels, task="segmentation")


def voc_detection(
    split: str = "val",
    root: str | None = None,
    size: int | None = None,
    samples: int | None = None,
    classes: Sequence[str] | None = None,
) -> Dataset:
    """Images and boxes from a folder in the form of VOC; objects marked as difficult are objects here too.

    Args:
        split: a list of names, ``ImageSets/Main/<split>.txt``.
        root: as of `voc_segmentation`; boxes are in ``Annotations``.
        size: as of `voc_segmentation`; boxes are scaled with their image.
        samples: how many to read, from the start of the list; None reads all.
        classes: names of the classes, the first of which has label 1; None means the twenty of VOC.

    Returns:
        x (N, 3, H, W) in [0, 1]; y (N, M, 5) as in `robplug.data.Dataset`.

    Raises:
        InputError: a file is missing or damaged, an object is of no class or not in its image, or sizes differ.

    Source: as of `voc_segmentation`.
    """
    top, names = _voc(root, "Main", split, samples)
    labels = ("background", *(VOC_CLASSES if classes is None else classes))
    paths = [top / "Annotations" / f"{name}.xml" for name in names]
    parts = [Sample(_image(top / "JPEGImages" / f"{p.stem}.jpg"), p, boxes=_read_objects(p, labels)) for p in paths]
    x, y = batch_boxes(parts, size)
    return Dataset("voc-detection", x, y, class_names=labels, task="detection")


def coco_detection(
    split: str = "val2017", root: str | None = None, size: int | None = None, samples: int | None = None
) -> Dataset:
    """Images and boxes from annotations in the form of COCO; crowds and boxes without area are left out.

    Args:
        split: images lie in ``<split>``, annotations in ``annotations/instances_<split>.json``.
        root: the folder of both, or one that holds them in ``coco``; None means the environment variable
            ``ROBPLUG_DATA``.
        size: as of `voc_detection`.
        samples: how many to read, in the order of their ids; None reads all.

    Returns:
        x (N, 3, H, W) in [0, 1]; y (N, M, 5), labels being the ids of the categories, as those of torchvision's
        networks are: an id that does not exist has the name "".

    Raises:
        InputError: a file is missing or damaged, or sizes differ without ``size``.
        RobplugError: pycocotools is not installed.

    Source: Lin et al. 2014, Microsoft COCO; the form is that of pycocotools.
    """
    top = _below(root_of(root, "COCO", COCO_SOURCE), ("", "coco"), f"annotations/instances_{split}.json", COCO_SOURCE)
    coco = _read_coco(top / "annotations" / f"instances_{split}.json")
    categories = {number: str(category["name"]) for number, category in coco.cats.items()}
    parts = []
    for number in sorted(coco.imgs)[:samples]:
        path = _inside(top / split, coco.imgs[number]["file_name"])
        objects = [item for item in coco.imgToAnns[number] if not item.get("iscrowd", 0)]
        boxes = [(x, y, x + w, y + h, item["category_id"]) for item in objects for x, y, w, h in [item["bbox"]]]
        boxes = [box for box in boxes if box[0] < box[2] and box[1] < box[3]]
        parts.append(Sample(_image(path), path, boxes=boxes))
    x, y = batch_boxes(parts, size)
    names = tuple("background" if k == 0 else categories.get(k, "") for k in range(max(categories) + 1))
    return Dataset("coco-detection", x, y, class_names=names, task="detection")


def _voc(root: str | None, task: str, split: str, samples: int | None) -> tuple[Path, list[str]]:
    """Returns the folder, and the names in a list of images."""
    given = root_of(root, "VOC", VOC_SOURCE)
    top = _below(given, ("", "VOC2012", "VOCdevkit/VOC2012"), f"ImageSets/{task}/{split}.txt", VOC_SOURCE)
    path = top / "ImageSets" / task / f"{split}.txt"
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for name in lines:
        if Path(name).name != name:
            raise InputError(f"a file's name without its suffix on each line of {path}", repr(name))
    return top, lines[:samples]


def _below(top: Path, places: Sequence[str], file: str, source: str) -> Path:
    for place in places:
        if (top / place / file).is_file():
            return top / place
    raise InputError(f"the file {file} in {' or '.join(str(top / place) for place in places)}", "none", source)


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"a file_name inside {folder}", repr(name))
    return path


def _image(path: Path) -> Bytes:
    """Returns an image as (H, W, 3); a grey one gets three equal channels."""
    image = read_image(path)
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image


def _read_mask(path: Path) -> Bytes:
    """Returns the (H, W) numbers of an image's palette, which are its labels."""
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise RobplugError("reading images needs the package pillow: pip install pillow") from error
    try:
        with Image.open(path) as image:
            mode, values = image.mode, np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"a whole image in {path}", f"{type(error).__name__}: {error}") from error
    if mode not in ("P", "L"):
        raise InputError(f"labels as a palette (P) or grey (L) in {path}", f"mode {mode}")
    return values


def _read_objects(path: Path, classes: Sequence[str]) -> list[tuple[float, ...]]:
    """Returns the boxes of an annotation file; its pixels count from 1, and its right and bottom edges belong to it."""
    found = [_read_object(item) for item in _read_xml(path).iter("object")]
    boxes: list[tuple[float, ...]] = []
    for name, edges in found:
        if name not in classes[1:]:
            raise InputError(f"objects of the classes {', '.join(classes[1:])} in {path}", repr(name), "see classes=")
        if edges is None:
            raise InputError(f"bndbox of each object in {path} with xmin, ymin, xmax and ymax as numbers", name)
        boxes.append((edges[0] - 1, edges[1] - 1, edges[2], edges[3], classes.index(name)))
    return boxes


def _read_xml(path: Path) -> ElementTree.Element:
    try:
        content = path.read_text(encoding="utf-8")
        if "<!DOCTYPE" not in content and "<!ENTITY" not in content:
            return ElementTree.fromstring(content)  # noqa: S314  # without entities it cannot grow
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise InputError(f"a whole annotation file {path}", f"{type(error).__name__}: {error}") from error
    raise InputError(f"plain elements in {path}", "a document type or entities", "remove them")


def _read_object(item: ElementTree.Element) -> tuple[str, list[float] | None]:
    """Returns name and edges of an object, or None for edges that are no numbers."""
    try:
        edges: list[float] | None = [
            float(item.findtext(f"bndbox/{edge}", "")) for edge in ("xmin", "ymin", "xmax", "ymax")
        ]
    except ValueError:
        edges = None
    return item.findtext("name", "").strip(), edges


def _read_coco(path: Path) -> Any:
    try:
        from pycocotools.coco import COCO
    except ModuleNotFoundError as error:
        message = "COCO's annotations need the package pycocotools: pip install 'robplug[vision]'"
        raise RobplugError(message) from error
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it tells how long it takes
            coco = COCO(str(path))
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise InputError(f"annotations of COCO's form in {path}", f"{type(error).__name__}: {error}") from error
    if not (coco.imgs and coco.cats):
        raise InputError(f"images and categories in {path}", f"{len(coco.imgs)} and {len(coco.cats)}")
    return coco

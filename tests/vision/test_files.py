"""Folders of VOC and COCO, written here by hand, whole ones and damaged ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import robplug
from robplug.errors import InputError

CAT, DOG = 8, 12  # of VOC's classes


def draw(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def obj(name: str, *edges: object) -> str:
    tags = "".join(f"<{tag}>{edge}</{tag}>" for tag, edge in zip(("xmin", "ymin", "xmax", "ymax"), edges, strict=True))
    return f"<object><name>{name}</name><difficult>1</difficult><bndbox>{tags}</bndbox></object>"


def write_voc(root: Path, sizes: dict[str, tuple[int, int]]) -> None:
    """Images by name, as lossless as JPEG is for one colour; labels: column 1 is cat, the last row void."""
    for folder in ("JPEGImages", "SegmentationClass", "Annotations", "ImageSets/Segmentation", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for number, (name, (height, width)) in enumerate(sizes.items()):
        Image.new("RGB", (width, height), (10 * number, 100, 200)).save(
            root / "JPEGImages" / f"{name}.jpg", quality=100
        )
        labels = np.zeros((height, width), dtype=np.uint8)
        labels[:, 1], labels[-1] = CAT, 255
        mask = Image.fromarray(labels, mode="P")
        mask.putpalette(list(range(256)) * 3)
        mask.save(root / "SegmentationClass" / f"{name}.png")
        inner = obj("cat", 2, 1, 2, height) + (obj("dog", 1, 1, width, 2) if number else "")
        (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{inner}</annotation>")
    for kind in ("Segmentation", "Main"):
        (root / "ImageSets" / kind / "val.txt").write_text("\n".join(sizes) + "\n")


def test_voc_pixels(tmp_path: Path) -> None:
    write_voc(tmp_path / "VOC2012", {"a": (4, 6), "b": (4, 6)})
    data = robplug.dataset("voc-segmentation", split="val", root=str(tmp_path))
    assert data.task == "segmentation" and len(data.class_names) == 21 and data.class_names[CAT] == "cat"
    assert data.x.shape == (2, 3, 4, 6) and data.y.dtype == torch.int64
    assert (data.x[:, 1] - 100 / 255).abs().max() < 0.01 and (data.x[1, 0] - 10 / 255).abs().max() < 0.01
    assert data.y[0].tolist() == [[0, CAT, 0, 0, 0, 0]] * 3 + [[255] * 6]


def test_voc_boxes_count_from_one_and_include_their_last_pixel(tmp_path: Path) -> None:
    write_voc(tmp_path, {"a": (4, 6), "b": (4, 6)})
    data = robplug.dataset("voc-detection", split="val", root=str(tmp_path))
    assert data.task == "detection" and data.y.dtype == torch.float32
    assert data.y.tolist() == [[[1, 0, 2, 4, CAT], [-1] * 5], [[1, 0, 2, 4, CAT], [0, 0, 6, 2, DOG]]]
    pixels = robplug.dataset("voc-segmentation", split="val", root=str(tmp_path)).y[0]
    assert (pixels[0:3, 1:2] == CAT).all()  # the same place


def test_images_of_different_sizes_are_brought_to_one_if_asked(tmp_path: Path) -> None:
    write_voc(tmp_path, {"wide": (4, 8), "high": (16, 8), "square": (8, 8)})
    for name in ("voc-segmentation", "voc-detection"):
        with pytest.raises(InputError, match=r"images of one size, \(4, 8\), got \(16, 8\) of .*high.*; pass size="):
            robplug.dataset(name, split="val", root=str(tmp_path))
    pixels = robplug.dataset("voc-segmentation", split="val", root=str(tmp_path), size=8)
    boxes = robplug.dataset("voc-detection", split="val", root=str(tmp_path), size=8)
    assert torch.equal(pixels.x, boxes.x) and pixels.x.shape == (3, 3, 8, 8)
    assert (pixels.y[0, 4:] == 255).all() and (pixels.x[0, :, 4:] == 128 / 255).all()
    assert (pixels.y[0, 3] == 255).all() and pixels.y[0, 0].tolist() == [0, CAT, 0, 0, 0, 0, 0, 0]
    assert set(pixels.y.unique().tolist()) == {0, CAT, 255}  # labels are chosen, not mixed
    assert (pixels.y[1, :, 4:] == 255).all() and (pixels.x[1, :, :, 4:] == 128 / 255).all()
    assert (pixels.x[1, 1, :, :4] - 100 / 255).abs().max() < 0.01
    assert boxes.y[0, 0].tolist() == [1, 0, 2, 4, CAT]
    assert boxes.y[1].tolist() == [[0.5, 0, 1, 8, CAT], [0, 0, 4, 1, DOG]]


def test_only_so_many_images_are_read(tmp_path: Path) -> None:
    write_voc(tmp_path, {"a": (4, 6), "b": (4, 6)})
    (tmp_path / "JPEGImages" / "b.jpg").unlink()
    assert len(robplug.dataset("voc-segmentation", root=str(tmp_path), samples=1)) == 1
    with pytest.raises(InputError, match=r"a whole image in .*b.jpg, got FileNotFoundError"):
        robplug.dataset("voc-segmentation", root=str(tmp_path))


def test_other_classes_than_those_of_voc(tmp_path: Path) -> None:
    write_voc(tmp_path, {"a": (4, 6), "b": (4, 6)})
    data = robplug.dataset("voc-detection", root=str(tmp_path), classes=["dog", "cat"])
    assert data.class_names == ("background", "dog", "cat") and data.y[1, :, 4].tolist() == [2, 1]
    with pytest.raises(InputError, match=r"labels below 3, or 255, in .*a.png, got 8; see classes="):
        robplug.dataset("voc-segmentation", root=str(tmp_path), classes=["dog", "cat"])
    with pytest.raises(InputError, match=r"objects of the classes dog in .*a.xml, got 'cat'"):
        robplug.dataset("voc-detection", root=str(tmp_path), classes=["dog"])


BOMB = '<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>'


@pytest.mark.parametrize(
    ("file", "content", "name", "message"),
    [
        ("Annotations/a.xml", BOMB, "detection", "plain elements in .*, got a document type or entities"),
        ("Annotations/a.xml", "<annotation>", "detection", "a whole annotation file .*, got ParseError"),
        ("Annotations/a.xml", b"\xff\xfe<\0", "detection", "a whole annotation file .*, got UnicodeDecodeError"),
        ("Annotations/a.xml", f"<a>{obj('cat', 1, 1, 'x', 2)}</a>", "detection", "ymax as numbers, got cat"),
        ("Annotations/a.xml", "<a><object><name>cat</name></object></a>", "detection", "ymax as numbers, got cat"),
        ("Annotations/a.xml", f"<a>{obj('cat', 1, 1, 9, 2)}</a>", "detection", "an area inside an image of 6 x 4"),
        ("Annotations/a.xml", f"<a>{obj('cat', 3, 1, 2, 2)}</a>", "detection", "an area inside an image of 6 x 4"),
        ("Annotations/a.xml", f"<a>{obj('cat', 'nan', 1, 2, 2)}</a>", "detection", "an area inside an image of 6 x 4"),
        ("JPEGImages/a.jpg", b"no image", "segmentation", "a whole image in .*a.jpg"),
        ("SegmentationClass/a.png", b"no image", "segmentation", "a whole image in .*a.png"),
        ("ImageSets/Segmentation/val.txt", "../../secret", "segmentation", "a file's name .*, got '../../secret'"),
        ("ImageSets/Main/val.txt", "", "detection", "at least one image, got none"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, file: str, content: str | bytes, name: str, message: str) -> None:
    write_voc(tmp_path, {"a": (4, 6)})
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        robplug.dataset(f"voc-{name}", root=str(tmp_path))


def test_masks_that_are_none_are_refused(tmp_path: Path) -> None:
    write_voc(tmp_path, {"a": (4, 6)})
    Image.fromarray(draw(4, 6, 0)).save(tmp_path / "SegmentationClass" / "a.png")
    with pytest.raises(InputError, match=r"labels as a palette \(P\) or grey \(L\) in .*a.png, got mode RGB"):
        robplug.dataset("voc-segmentation", root=str(tmp_path))
    Image.fromarray(draw(5, 6, 0)[..., 0] % 2).save(tmp_path / "SegmentationClass" / "a.png")
    with pytest.raises(InputError, match=r"labels of their image's size \(4, 6\) in .*a.png, got \(5, 6\)"):
        robplug.dataset("voc-segmentation", root=str(tmp_path))


def test_a_folder_that_is_none_of_voc(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"the file ImageSets/Main/val.txt in .*VOCdevkit/VOC2012, got none; the VOC page"
    ):
        robplug.dataset("voc-detection", root=str(tmp_path))


def write_coco(root: Path, change: dict[str, Any]) -> None:
    (root / "annotations").mkdir(parents=True)
    (root / "tiny").mkdir()
    Image.fromarray(draw(4, 6, 0)).save(root / "tiny" / "first.png")
    Image.fromarray(draw(4, 6, 1)[..., 0]).save(root / "tiny" / "grey.png")
    annotation = {"image_id": 7, "category_id": 3, "iscrowd": 0, "area": 4.0}
    content = {
        "images": [
            {"id": 9, "file_name": "grey.png", "height": 4, "width": 6},
            {"id": 7, "file_name": "first.png", "height": 4, "width": 6},
        ],
        "categories": [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}],
        "annotations": [
            {**annotation, "id": 1, "bbox": [1, 0.5, 2, 3]},
            {**annotation, "id": 2, "bbox": [0, 0, 6, 4], "category_id": 1},
            {**annotation, "id": 3, "bbox": [0, 0, 6, 4], "iscrowd": 1},
            {**annotation, "id": 4, "bbox": [2, 2, 0, 1]},
        ],
        **change,
    }
    (root / "annotations" / "instances_tiny.json").write_text(json.dumps(content))


def test_coco_boxes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_coco(tmp_path / "coco", {})
    data = robplug.dataset("coco-detection", split="tiny", root=str(tmp_path))
    assert data.class_names == ("background", "person", "", "car") and data.task == "detection"
    assert data.y.tolist() == [[[1, 0.5, 3, 3.5, 3], [0, 0, 6, 4, 1]], [[-1] * 5] * 2]
    assert np.array_equal((data.x[0].permute(1, 2, 0) * 255).round().numpy(), draw(4, 6, 0))
    assert np.array_equal((data.x[1] * 255).round().numpy(), np.stack([draw(4, 6, 1)[..., 0]] * 3))
    assert capsys.readouterr().out == ""
    assert len(robplug.dataset("coco-detection", split="tiny", root=str(tmp_path), samples=1)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": []}, "images and categories in .*, got 0 and 2"),
        ({"images": [{"id": 7, "file_name": "../annotations/instances_tiny.json"}]}, "a file_name inside"),
        ({"images": [{"id": 7, "file_name": "missing.png"}]}, "a whole image in .*missing.png"),
        ({"annotations": 5}, "annotations of COCO's form in .*, got TypeError"),
    ],
)
def test_damaged_annotations_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_coco(tmp_path, change)
    with pytest.raises(InputError, match=message):
        robplug.dataset("coco-detection", split="tiny", root=str(tmp_path))


def test_annotations_that_are_no_json(tmp_path: Path) -> None:
    write_coco(tmp_path, {})
    (tmp_path / "annotations" / "instances_tiny.json").write_text("[")
    with pytest.raises(InputError, match="annotations of COCO's form"):
        robplug.dataset("coco-detection", split="tiny", root=str(tmp_path))

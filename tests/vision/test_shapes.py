"""The synthetic shapes against their own description."""

from __future__ import annotations

import pytest
import torch

import robplug
from robplug.errors import InputError
from robplug.vision.shapes import HUES, shapes


def test_colours_are_what_was_asked_for_up_to_the_noise() -> None:
    data = robplug.dataset("shapes", samples=40, classes=7, contrast=0.05, noise=0.01)
    assert data.x.dtype == torch.float32 and 0 <= data.x.min() and data.x.max() <= 1
    assert data.class_names == ("background", *HUES) and set(data.y.unique().tolist()) == set(range(7))
    for label, signs in enumerate([(0, 0, 0), *HUES.values()]):
        values = data.x.transpose(0, 1)[:, data.y == label]
        expected = 0.5 + 0.05 * torch.tensor(signs, dtype=torch.float32)
        bound = 5 * 0.01 / values.shape[1] ** 0.5
        assert ((values.mean(1) - expected).abs() < bound).all()
        assert values.std(1).sub(0.01).abs().max() < 0.001


def test_boxes_are_the_tightest_around_each_shape_and_do_not_overlap() -> None:
    data = shapes(samples=60, noise=0.0)
    counts = set()
    for pixels, rows in zip(data.y, data.labels("detection"), strict=True):
        rest = pixels.clone()
        real = rows[rows[:, 4] != -1]
        assert torch.equal(rows[: len(real)], real)  # padding comes last
        counts.add(len(real))
        for x1, y1, x2, y2, label in real.long().tolist():
            inside = rest[y1:y2, x1:x2]
            covered = inside == label
            assert covered.any(0).all() and covered.any(1).all()
            assert ((inside == 0) | covered).all()
            rest[y1:y2, x1:x2] = 0
        assert not rest.any()
    assert counts == {1, 2, 3, 4}


def test_an_image_depends_on_seed_split_and_its_number_alone() -> None:
    few, many = shapes(samples=5), shapes(samples=9)
    assert torch.equal(few.x, many.x[:5]) and torch.equal(few.y, many.y[:5])
    assert few.digest == many.head(5).digest
    images = [
        tuple(image.flatten()[:50].tolist()) for image in (*many.x, *shapes("train", 9).x, *shapes(samples=9, seed=1).x)
    ]
    assert len(set(images)) == 27


def test_both_data_sets_have_the_same_images_and_labels() -> None:
    pixels, boxes = robplug.dataset("shapes", samples=4), robplug.dataset("shapes-boxes", samples=4)
    assert (pixels.task, boxes.task) == ("segmentation", "detection")
    assert torch.equal(pixels.x, boxes.x)
    for task in ("segmentation", "detection"):
        assert torch.equal(pixels.labels(task), boxes.labels(task))
    assert pixels.digest != boxes.digest


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"split": "val"}, "train or test"),
        ({"samples": 0}, "samples >= 1, got 0"),
        ({"size": 24}, "size >= 25"),
        ({"classes": 1}, "2 to 7 classes"),
        ({"classes": 8}, "2 to 7 classes"),
        ({"contrast": 0.0}, "contrast > 0"),
        ({"contrast": 0.45}, "contrast > 0"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(params: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        shapes(**params)

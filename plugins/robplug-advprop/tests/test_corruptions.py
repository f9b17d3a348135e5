"""Corruptions: closed forms of those that have one, the library's rules, and mCE by hand.

What asks the library is skipped, with a reason, where it is not installed: it brings numba, OpenCV and scikit-image.
"""

from __future__ import annotations

import doctest
import importlib.util
import sys

import numpy as np
import pytest
import torch
from torch import nn

from robplug.data import Dataset
from robplug.errors import InputError, RobplugError
from robplug_advprop import corruptions
from robplug_advprop.corruptions import corrupt, corruption_errors, corruption_names, mean_corruption_error

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("imagecorruptions") is None,
    reason="corruptions are not tested: imagecorruptions-imaug is not installed (robplug-advprop[corruptions])",
)


def images(count: int = 3, channels: int = 3, bounds: tuple[float, float] = (0.0, 1.0)) -> Dataset:
    levels = torch.randint(0, 256, (count, channels, 32, 32), generator=torch.Generator().manual_seed(0))
    x = levels / 255 * (bounds[1] - bounds[0]) + bounds[0]
    return Dataset("noise", x, torch.arange(count) % 2, bounds)


@needs_library
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 1.0)])
def test_contrast_is_its_formula(bounds: tuple[float, float]) -> None:
    data = images(bounds=bounds)
    unit = (data.x - bounds[0]) / (bounds[1] - bounds[0])
    mean = unit.mean((2, 3), keepdim=True)
    found = (corrupt(data, "contrast", 3).x - bounds[0]) / (bounds[1] - bounds[0])
    torch.testing.assert_close(found, (unit - mean) * 0.2 + mean, rtol=0, atol=1.01 / 255)


@needs_library
@pytest.mark.parametrize("name", corruption_names() if importlib.util.find_spec("imagecorruptions") else ["none"])
def test_draws_are_an_images_own(name: str) -> None:
    data, before = images(), np.random.get_state()[1].copy()
    found = corrupt(data, name, 4)
    assert found.x.shape == data.x.shape and found.x.min() >= 0 and found.x.max() <= 1
    assert torch.equal(corrupt(data, name, 4).x, found.x) and torch.equal(corrupt(data.head(1), name, 4).x, found.x[:1])
    assert not torch.equal(found.x, data.x) and torch.equal(found.y, data.y)
    assert np.array_equal(np.random.get_state()[1], before)


@needs_library
def test_noise_has_the_papers_strength_and_grey_images_stay_grey() -> None:
    grey = Dataset("grey", torch.full((20, 1, 32, 32), 0.5), torch.zeros(20, dtype=torch.int64))
    found = corrupt(grey, "gaussian_noise", 1).x - 0.5
    assert found.shape == grey.x.shape and abs(float(found.std()) - 0.08) < 0.003  # of 20,480 draws: 7 deviations
    assert not torch.equal(found[0], found[1]) and not torch.equal(corrupt(grey, "gaussian_noise", 1, seed=1).x, found)


@needs_library
def test_families_and_errors() -> None:
    assert sorted(name for family in corruptions.FAMILIES for name in corruption_names(family)) == sorted(
        corruption_names()
    )
    for arguments, words in (
        (("noise", 1), "a corruption: .*got 'noise'"),
        (("fog", 0), "severity from 1 to 5, got 0"),
    ):
        with pytest.raises(InputError, match=words):
            corrupt(images(), *arguments)
    with pytest.raises(InputError, match="at least 32x32, got"):
        corrupt(Dataset("small", torch.rand(1, 3, 8, 8), torch.zeros(1).long()), "fog", 1)
    with pytest.raises(InputError, match="a family of corruptions"):
        corruption_names("rain")


@needs_library
def test_the_error_of_a_network() -> None:
    class Brightest(nn.Module):
        """Class 1 above a mean of 0.6."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not self.training
            mean = x.mean((1, 2, 3))
            return torch.stack([torch.full_like(mean, 0.6), mean], 1)

    data = Dataset("dark", torch.full((5, 3, 32, 32), 0.5), torch.zeros(5, dtype=torch.int64))
    model = Brightest().train()
    # brightness adds .1 to .5 to the value: 0.5 becomes 0.6 (rounded down), 0.7, ...
    assert corruption_errors(model, data, ["brightness"], batch_size=2) == {"brightness": [0.0, 1.0, 1.0, 1.0, 1.0]}
    assert model.training


def test_mean_corruption_error_by_hand() -> None:
    assert doctest.testmod(corruptions).attempted == 1 and doctest.testmod(corruptions).failed == 0
    errors = {"fog": [0.1, 0.2, 0.3], "snow": [0.5, 0.5, 0.5]}
    assert mean_corruption_error(errors, errors) == pytest.approx(100)
    reference = {"fog": [0.3, 0.4, 0.5], "snow": [1.0, 1.0, 1.0]}
    assert mean_corruption_error(errors, reference) == pytest.approx(50)
    for wrong in ({"fog": [0.1, 0.2, 0.3]}, {"fog": [0.1, 0.2, 0.3], "snow": [0.5]}):
        with pytest.raises(InputError, match="the same corruptions and severities"):
            mean_corruption_error(errors, wrong)
    with pytest.raises(InputError, match="a reference that errs under snow"):
        mean_corruption_error(errors, {"fog": [0.3, 0.4, 0.5], "snow": [0.0, 0.0, 0.0]})


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(RobplugError, match=r"pip install 'robplug-advprop\[corruptions\]'"):
        corrupt(images(), "fog", 1)

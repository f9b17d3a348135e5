"""Common corruptions for evaluation, as in ImageNet-C, by the library imagecorruptions; and their mean error.

The library is the fork ``imagecorruptions-imaug``: the original does not run with numpy 2 and current scikit-image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from robplug.data import Dataset
from robplug.errors import InputError, RobplugError
from robplug.isolation import seeded_globals
from robplug.targets import evaluation_mode
from robplug.training_setup import sub_seed

SEVERITIES = (1, 2, 3, 4, 5)
FAMILIES = ("noise", "blur", "weather", "digital")
_SEEDED = ("impulse_noise", "glass_blur")  # these draw from generators of their own


def corruption_names(family: str | None = None) -> list[str]:
    """Returns the library's names of the 15 corruptions of ImageNet-C, or of those of one family.

    Args:
        family: ``"noise"``, ``"blur"``, ``"weather"`` or ``"digital"``.

    Raises:
        InputError: there is no such family.
        RobplugError: the library is not installed.
    """
    if family is not None and family not in FAMILIES:
        raise InputError(f"a family of corruptions: {', '.join(FAMILIES)}", repr(family))
    return list(_library().get_corruption_names(family or "common"))


def corrupt(data: Dataset, name: str, severity: int, seed: int = 0) -> Dataset:
    """Returns a data set with every image corrupted, in 256 levels as the library works.

    An image's draws depend on the seed, the corruption and its place in the data set, not on other images.

    Args:
        data: images of 32x32 or more, (N, 1 or 3, H, W). Grey ones get the first channel of what the library makes.
        name: of `corruption_names`, or one of the library's four others.
        severity: from 1 to 5. The strengths are those for images of 224x224, whatever the size: they are not those of
            CIFAR-10-C.
        seed: of the draws.

    Raises:
        InputError: images, name or severity do not fit.
        RobplugError: the library is not installed.

    Source: Hendrycks and Dietterich 2019, Benchmarking Neural Network Robustness to Common Corruptions and
        Perturbations, section 3.
    """
    library = _library()
    known = library.get_corruption_names("all")
    if name not in known:
        raise InputError(f"a corruption: {', '.join(known)}", repr(name))
    if severity not in SEVERITIES:
        raise InputError("severity from 1 to 5", severity)
    shape = tuple(data.x.shape)
    if len(shape) != 4 or shape[1] not in (1, 3) or min(shape[2:]) < 32:
        raise InputError("images of shape (N, 1 or 3, H, W), at least 32x32", shape, "resize them")
    low, high = data.bounds
    levels = ((data.x - low) / (high - low) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    changed = np.empty_like(levels)
    with seeded_globals(seed):
        for place, image in enumerate(levels):
            draws = sub_seed(seed, name, severity, place) % (1 << 32)
            np.random.seed(draws)
            options = {"seed": draws} if name in _SEEDED else {}
            made = library.corrupt(image, corruption_name=name, severity=severity, **options)
            changed[place] = made[..., : shape[1]]
    x = torch.from_numpy(changed).permute(0, 3, 1, 2).contiguous().to(data.x.dtype) / 255 * (high - low) + low
    return replace(data, name=f"{data.name}, {name} {severity}", x=x)


def corruption_errors(
    model: nn.Module, data: Dataset, names: Sequence[str] | None = None, seed: int = 0, batch_size: int = 250
) -> dict[str, list[float]]:
    """Returns the error of a network on corrupted images, from 0 to 1, at each severity, by the corruption's name.

    Args:
        model: maps samples inside the data's bounds to logits; it is asked in eval mode.
        data: clean images and their labels.
        names: of corruptions; the 15 of ImageNet-C without.
        seed: of the draws.
        batch_size: images a pass.
    """
    chosen = corruption_names() if names is None else names
    return {name: [_error(model, corrupt(data, name, s, seed), batch_size) for s in SEVERITIES] for name in chosen}


def mean_corruption_error(errors: Mapping[str, Sequence[float]], reference: Mapping[str, Sequence[float]]) -> float:
    """Returns the mCE in per cent: errors relative to those of a reference network, which has 100.

    Args:
        errors: of a network, at each severity, by the corruption's name: what `corruption_errors` returns.
        reference: likewise; AlexNet in ImageNet-C.

    Raises:
        InputError: the two are not of the same corruptions and severities, or the reference makes no error.

    Source: Hendrycks and Dietterich 2019, section 4.2: the mean over corruptions of the ratio of sums over severities.

    Example:
        >>> mean_corruption_error({"fog": [0.1, 0.2], "snow": [0.3, 0.3]}, {"fog": [0.3, 0.3], "snow": [0.2, 0.4]})
        75.0
    """
    if not errors or {k: len(v) for k, v in errors.items()} != {k: len(v) for k, v in reference.items()}:
        remedy = "measure both by corruption_errors"
        raise InputError("errors of the same corruptions and severities", f"{list(errors)}, {list(reference)}", remedy)
    for name, values in reference.items():
        if not sum(values) > 0:
            raise InputError(f"a reference that errs under {name}", 0.0, "take a weaker one")
    return 100 * sum(sum(errors[name]) / sum(reference[name]) for name in errors) / len(errors)


@torch.no_grad()
def _error(model: nn.Module, data: Dataset, batch_size: int) -> float:
    with evaluation_mode(model):
        wrong: list[Tensor] = [
            (model(x).argmax(1) != y).sum()
            for x, y in zip(data.x.split(batch_size), data.y.split(batch_size), strict=True)
        ]
    return float(sum(wrong)) / len(data)


def _library() -> ModuleType:
    try:
        import imagecorruptions
    except ModuleNotFoundError as error:
        message = "corruptions need the package imagecorruptions-imaug: pip install 'robplug-advprop[corruptions]'"
        raise RobplugError(message) from error
    library: ModuleType = imagecorruptions
    return library

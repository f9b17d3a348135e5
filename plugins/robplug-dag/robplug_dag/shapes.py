"""Predictions in a wanted shape: label maps made of text or masks, and images that start from noise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robplug.errors import InputError, RobplugError
from robplug.rng import Rng


def text_mask(text: str, height: int, width: int) -> Tensor:
    """Returns a mask with a line of text, as large as it fits, in the middle.

    Needs the package pillow: ``pip install robplug-dag[text]``.

    Args:
        text: what is to be read, such as ``"2017"``.
        height: rows of the mask.
        width: columns.

    Returns:
        (height, width) bool, True on the letters.

    Raises:
        InputError: the text has no visible letter, or the mask no pixel.
        RobplugError: pillow is not installed.
    """
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ModuleNotFoundError as error:
        raise RobplugError("text_mask needs pillow: pip install robplug-dag[text]") from error
    if height < 1 or width < 1:
        raise InputError("height and width >= 1", (height, width))
    font = ImageFont.load_default(size=max(height, 16))
    left, top, right, bottom = (round(side) for side in font.getbbox(text))
    if right <= left or bottom <= top:
        raise InputError("text with visible letters", repr(text))
    letters = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(letters).text((-left, -top), text, fill=255, font=font)
    scale = min(width / letters.width, height / letters.height)
    letters = letters.resize((max(1, int(letters.width * scale)), max(1, int(letters.height * scale))))
    whole = Image.new("L", (width, height))
    whole.paste(letters, ((width - letters.width) // 2, (height - letters.height) // 2))
    return torch.tensor(list(whole.tobytes()), dtype=torch.uint8).view(height, width) > 127


def label_map(mask: Tensor, inside: int, outside: int = 0) -> Tensor:
    """Returns the class to be predicted at each pixel, (H, W) int64: ``inside`` where the (H, W) bool mask is True.

    Raises:
        InputError: the mask is none.
    """
    if mask.dim() != 2 or mask.dtype != torch.bool:
        raise InputError(
            "a mask (H, W) of bool", f"{tuple(mask.shape)} of {mask.dtype}", "compare it, as in mask > 0.5"
        )
    return torch.where(mask, inside, outside)


def strongest_rivals(logits: Tensor, goals: Tensor) -> Tensor:
    """Returns for each pixel the class with the largest logit but the goal: labels with which every pixel is attacked.

    With the true labels a pixel whose label is its goal is none of the targets, and nothing brings it back if its
    prediction changes with its neighbours'.

    Args:
        logits: (N, C, H, W).
        goals: (N, H, W) int64 classes.

    Returns:
        (N, H, W) int64.
    """
    return logits.detach().scatter(1, goals[:, None], -torch.inf).argmax(1)


def fooling_start(
    logits_fn: Callable[[Tensor], Tensor],
    goals: Tensor,
    rng: Rng,
    *,
    channels: int = 3,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> tuple[Tensor, Tensor]:
    """Returns images of noise, and labels with which all of their pixels are attacked.

    Args:
        logits_fn: maps images to logits (N, C, H, W).
        goals: (N, H, W) int64, the class that the network is to see at each pixel.
        rng: N streams.
        channels: of an image.
        bounds: between which the noise is uniform.

    Returns:
        (N, channels, H, W) float32 images, and (N, H, W) int64 labels, the strongest rivals of the goals.

    Example:
        >>> import torch, robplug_dag
        >>> from robplug.rng import Rng
        >>> scores = lambda x: torch.cat([x, 1 - x], dim=1)
        >>> goals = robplug_dag.label_map(torch.eye(4) > 0, inside=1)[None]
        >>> x, labels = robplug_dag.fooling_start(scores, goals, Rng(0, [0]), channels=1)
        >>> x_adv, _ = robplug_dag.dag(scores, x, labels, goals, rule="goal")
        >>> bool((scores(x_adv).argmax(1) == goals).all())
        True

    Source: Xie et al. 2017; section 2.3.4 of the dissertation (fooling images).
    """
    x = rng.uniform((channels, *goals.shape[1:]), *bounds, like=torch.empty((), device=goals.device))
    with torch.no_grad():
        return x, strongest_rivals(logits_fn(x), goals)

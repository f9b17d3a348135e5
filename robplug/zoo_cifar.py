"""Larger networks for CIFAR: VGG-11 with batch norm, and ResNet-18."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from robplug.zoo import Normalize, normalize_by

Activation = Callable[[Tensor], Tensor]

VGG11 = (64, None, 128, None, 256, 256, None, 512, 512, None, 512, 512, None)
"""Channels of the convolutions; None is a 2x2 maximum."""


class VGG(nn.Module):
    """3x3 convolutions with batch norm, maxima, and one linear layer. Takes (N, 3, 32, 32), gives (N, classes) logits.

    Source: Simonyan and Zisserman 2015, table 1, column A.
    Differs: batch norm after each convolution, and one linear layer for three, as is common for images of 32x32.

    Args:
        plan: channels of the convolutions, None for a 2x2 maximum.
        classes: number of classes.
        normalize: applied to the images first, or None.
    """

    def __init__(self, plan: Sequence[int | None], classes: int, normalize: Normalize | None = None) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in plan:
            if width is None:
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
        self.normalize = nn.Identity() if normalize is None else normalize
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits."""
        return self.linear(self.features(self.normalize(x)).flatten(1))  # type: ignore[no-any-return]


class ProjectionBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut, a 1x1 convolution where the shape changes (option B).

    Args:
        channels_in: channels of the input.
        channels: channels of the output.
        stride: of the first convolution and of the shortcut.
        activation: after the first batch norm and after the sum.
    """

    def __init__(self, channels_in: int, channels: int, stride: int, activation: Activation) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Returns (N, channels, H / stride, W / stride)."""
        h = self.bn2(self.conv2(self.activation(self.bn1(self.conv1(x)))))
        return self.activation(h + self.shortcut(x))


class ResNet18(nn.Module):
    """Four stages of two blocks, begun by a 3x3 convolution. Takes (N, 3, H, W), gives (N, classes) logits.

    Source: He et al. 2016, table 1.
    Differs: the first convolution is 3x3 with stride 1 and no maximum follows, as is common for images of 32x32.

    Args:
        classes: number of classes.
        normalize: applied to the images first, or None.
        width: channels of the first stage; each further stage has twice as many.
        activation: a smooth one in place of ReLU, say.
    """

    def __init__(
        self, classes: int, normalize: Normalize | None = None, width: int = 64, activation: Activation = F.relu
    ) -> None:
        super().__init__()
        self.normalize = nn.Identity() if normalize is None else normalize
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        blocks = []
        channels = width
        for stage in range(4):
            for stride in (2 if stage else 1, 1):
                blocks.append(ProjectionBlock(channels, width << stage, stride, activation))
                channels = width << stage
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(channels, classes)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits."""
        h = self.blocks(self.activation(self.bn1(self.conv1(self.normalize(x)))))
        return self.linear(h.mean((2, 3)))  # type: ignore[no-any-return]


def vgg11(classes: int = 10, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> nn.Module:
    """Returns an untrained VGG-11 with batch norm (9,231,114 parameters for ten classes).

    Args:
        classes: number of classes.
        mean: of the input's channels, subtracted first.
        std: of the input's channels.

    Raises:
        InputError: only one of mean and std is given.
    """
    return VGG(VGG11, classes, normalize_by(mean, std))


def resnet18(classes: int = 10, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> nn.Module:
    """Returns an untrained ResNet-18 for small images (11,173,962 parameters for ten classes).

    Args:
        classes: number of classes.
        mean: of the input's channels, subtracted first.
        std: of the input's channels.

    Raises:
        InputError: only one of mean and std is given.
    """
    return ResNet18(classes, normalize_by(mean, std))

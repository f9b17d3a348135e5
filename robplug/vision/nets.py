"""Two small segmentation networks of different families."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_block(channels_in: int, channels: int, stride: int = 1) -> nn.Sequential:
    """Returns a 3x3 convolution, batch norm and ReLU; (H, W) become (H / stride, W / stride), rounded up."""
    conv = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())


class FCN(nn.Module):
    """A fully convolutional network: strided encoder, scores at a half and at a quarter of the size, added.

    Source: Long, Shelhamer and Darrell 2015, section 4.2 (skips), at small scale.
    Differs: bilinear upsampling that is not learnt.

    Args:
        classes: number of classes, with the background.
        width: channels at half the size.
    """

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(conv_block(3, width, stride=2), conv_block(width, width))
        self.stage2 = nn.Sequential(
            conv_block(width, 2 * width, stride=2), conv_block(2 * width, 2 * width), conv_block(2 * width, 2 * width)
        )
        self.score1 = nn.Conv2d(width, classes, 1)
        self.score2 = nn.Conv2d(2 * width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Takes (N, 3, H, W), returns (N, classes, H, W) logits."""
        half = self.stage1(x)
        scores = self.score2(self.stage2(half))
        scores = self.score1(half) + F.interpolate(scores, half.shape[2:], mode="bilinear", align_corners=False)
        return F.interpolate(scores, x.shape[2:], mode="bilinear", align_corners=False)


class UNet(nn.Module):
    """An encoder and a decoder of three levels, each level's maps handed across.

    Source: Ronneberger, Fischer and Brox 2015, section 2, at small scale.
    Differs: padded convolutions with batch norm, nearest-neighbour upsampling, means in place of maxima, which would
        pick the noise of single pixels.

    Args:
        classes: number of classes, with the background.
        width: channels at full size.
    """

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.down1 = conv_block(3, width)
        self.down2 = conv_block(width, 2 * width)
        self.bottom = nn.Sequential(conv_block(2 * width, 4 * width), conv_block(4 * width, 2 * width))
        self.up2 = conv_block(4 * width, width)
        self.up1 = conv_block(2 * width, width)
        self.score = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Takes (N, 3, H, W), returns (N, classes, H, W) logits."""
        full = self.down1(x)
        half = self.down2(F.avg_pool2d(full, 2))
        bottom = self.bottom(F.avg_pool2d(half, 2))
        h = self.up2(torch.cat([half, F.interpolate(bottom, half.shape[2:])], 1))
        h = self.up1(torch.cat([full, F.interpolate(h, full.shape[2:])], 1))
        return self.score(h)  # type: ignore[no-any-return]


def fcn_small(classes: int = 4, width: int = 24) -> nn.Module:
    """Returns an untrained `FCN`.

    Args:
        classes: number of classes, with the background.
        width: channels at half the size.
    """
    return FCN(classes, width)


def unet_small(classes: int = 4, width: int = 12) -> nn.Module:
    """Returns an untrained `UNet`.

    Args:
        classes: number of classes, with the background.
        width: channels at full size.
    """
    return UNet(classes, width)

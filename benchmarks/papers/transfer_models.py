"""The networks of the transfer benchmark; all take images in [0, 1] and normalise them.

Those for CIFAR take (N, 3, 32, 32), and 35x35, which the paper's input diversity makes of it. They give (N, 10) logits
and are a family each: residual, VGG-like, separable, without batch norm. The recipes ``transfer-train-*.toml`` train
them, but for the ResNets, whose weights are a common release.
"""

from __future__ import annotations

from torch import Tensor, nn

from robplug.zoo import CifarResNet, Normalize
from robplug.zoo_cifar import VGG

RELEASE = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation that the common release of trained CIFAR ResNets wants."""


def resnet20() -> nn.Module:
    """Returns the ResNet-20 of the common release."""
    return CifarResNet(3, Normalize(*RELEASE))


def resnet32() -> nn.Module:
    """Returns the ResNet-32 of the common release."""
    return CifarResNet(5, Normalize(*RELEASE))


def vgg() -> nn.Module:
    """Returns eight 3x3 convolutions with batch norm and maxima between them (295,770 parameters)."""
    plan = (16, 16, None, 32, 32, None, 64, 64, None, 128, None, 128, None)
    return VGG(plan, 10, Normalize(*RELEASE))


class Separable(nn.Module):
    """A 3x3 convolution, then pairs of a depthwise 3x3 and a 1x1 convolution with batch norm (67,914 parameters).

    Source: Howard et al. 2017, section 3.1, at a size for 32x32 images.
    """

    def __init__(self) -> None:
        super().__init__()
        self.normalize = Normalize(*RELEASE)
        layers = _convolution(3, 32, 3)
        for channels_in, channels, stride in ((32, 64, 2), (64, 128, 2), (128, 128, 1), (128, 256, 2)):
            layers += _convolution(channels_in, channels_in, 3, stride, groups=channels_in)
            layers += _convolution(channels_in, channels, 1)
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits."""
        return self.linear(self.features(self.normalize(x)).mean((2, 3)))  # type: ignore[no-any-return]


def _convolution(channels_in: int, channels: int, side: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    options = {"stride": stride, "padding": side // 2, "groups": groups}
    return [nn.Conv2d(channels_in, channels, side, bias=False, **options), nn.BatchNorm2d(channels), nn.ReLU()]


class Plain(nn.Module):
    """Three 5x5 convolutions with maxima and two linear layers, without batch norm (250,234 parameters).

    Source: the layers of LeCun et al. 1998, section II-B, wider and with one convolution more.
    """

    def __init__(self) -> None:
        super().__init__()
        self.normalize = Normalize(*RELEASE)
        layers: list[nn.Module] = []
        for channels_in, channels in ((3, 32), (32, 48), (48, 64)):
            layers += [nn.Conv2d(channels_in, channels, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.readout = nn.Sequential(nn.Linear(64 * 4 * 4, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits."""
        return self.readout(self.features(self.normalize(x)).flatten(1))  # type: ignore[no-any-return]


def imagenet(name: str) -> nn.Module:
    """Returns a trained ImageNet network that takes images (N, 3, H, W) in [0, 1] and normalises them.

    Args:
        name: of timm, such as ``"inception_v3.tf_in1k"``; its weights are downloaded when they are first wanted.
    """
    import timm

    network = timm.create_model(name, pretrained=True)
    settings = timm.data.resolve_model_data_config(network)
    return nn.Sequential(Normalize(settings["mean"], settings["std"]), network)

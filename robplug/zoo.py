"""Networks: for the digits, for MNIST (LeNet, the Keras example) and CIFAR (ResNet-20); two trained digits networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robplug.data import ASSETS
from robplug.errors import InputError


class DigitsCNN(nn.Module):
    """Two 3x3 convolutions, a 2x2 maximum and a linear layer: 9,930 parameters, no batch norm.

    Takes (N, 1, 8, 8) in [0, 1], gives (N, 10) logits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.linear = nn.Linear(32 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits."""
        h = F.relu(self.conv1(x))
        h = F.max_pool2d(F.relu(self.conv2(h)), 2)
        return self.linear(h.flatten(1))  # type: ignore[no-any-return]


class LeNet(nn.Module):
    """LeNet-5 with ReLU and maxima: 61,706 parameters. Takes (N, 1, 28, 28) in [0, 1], gives (N, 10) logits.

    Source: LeCun et al. 1998, section II-B.
    Differs: ReLU for the scaled tanh, maximum for the trainable mean, all maps of layer C3 connected, a linear output.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.linear1 = nn.Linear(16 * 5 * 5, 120)
        self.linear2 = nn.Linear(120, 84)
        self.linear3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits."""
        h = F.max_pool2d(F.relu(self.conv1(x)), 2)
        h = F.max_pool2d(F.relu(self.conv2(h)), 2).flatten(1)
        return self.linear3(F.relu(self.linear2(F.relu(self.linear1(h)))))  # type: ignore[no-any-return]


class KerasMnistCNN(nn.Module):
    """The network of Keras' MNIST example: 1,199,882 parameters. Takes (N, 1, 28, 28) in [0, 1], gives (N, 10) logits.

    Two 3x3 convolutions without padding, a 2x2 maximum and two linear layers, with dropout before each of these.

    Source: https://keras.io/examples/mnist_cnn, which Fidel et al. 2020 (robplug-nsloss), section IV-B, use.
    Differs: logits for probabilities, PyTorch's initialisation for Glorot's, channels come first where it flattens.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.dropout1 = nn.Dropout(0.25)
        self.linear1 = nn.Linear(64 * 12 * 12, 128)
        self.dropout2 = nn.Dropout(0.5)
        self.linear2 = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits."""
        h = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2)
        h = F.relu(self.linear1(self.dropout1(h).flatten(1)))
        return self.linear2(self.dropout2(h))  # type: ignore[no-any-return]


class Normalize(nn.Module):
    """Subtracts a mean and divides by a standard deviation per channel; both are constants, not part of the state.

    Args:
        mean: one value per channel.
        std: likewise.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(value > 0 for value in std):
            raise InputError("a mean and a std > 0 per channel", (tuple(mean), tuple(std)))
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (x - mean) / std; x (N, C, H, W)."""
        return (x - self.mean) / self.std


def normalize_by(mean: Sequence[float] | None, std: Sequence[float] | None) -> Normalize | None:
    """Returns a `Normalize`, or None if neither is given.

    Raises:
        InputError: only one of them is given.
    """
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise InputError("both mean and std, or neither", (mean, std))
    return Normalize(mean, std)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut without parameters (option A).

    Args:
        channels_in: channels of the input.
        channels: channels of the output.
        stride: of the first convolution; the shortcut takes every stride-th pixel and pads new channels with zeros,
            half of them before and half after.
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.padding = (channels - channels_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Returns (N, channels, H / stride, W / stride)."""
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(h + F.pad(shortcut, (0, 0, 0, 0, self.padding, self.padding)))


class CifarResNet(nn.Module):
    """A residual network for 32x32 images: 6n + 2 layers with 16, 32 and 64 channels.

    Source: He et al. 2016, section 4.2, shortcuts of option A. The names of the parameters are those of the common
    release of trained weights, without its prefix ``module.``.

    Args:
        blocks: blocks per stage, n.
        normalize: applied to the images first, or None.
    """

    def __init__(self, blocks: int, normalize: Normalize | None = None) -> None:
        super().__init__()
        self.normalize = nn.Identity() if normalize is None else normalize
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, 1, blocks)
        self.layer2 = _stage(16, 32, 2, blocks)
        self.layer3 = _stage(32, 64, 2, blocks)
        self.linear = nn.Linear(64, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Takes (N, 3, 32, 32), returns (N, 10) logits."""
        h = F.relu(self.bn1(self.conv1(self.normalize(x))))
        h = self.layer3(self.layer2(self.layer1(h)))
        return self.linear(h.mean((2, 3)))  # type: ignore[no-any-return]


def _stage(channels_in: int, channels: int, stride: int, blocks: int) -> nn.Sequential:
    rest = [BasicBlock(channels, channels, 1) for _ in range(blocks - 1)]
    return nn.Sequential(BasicBlock(channels_in, channels, stride), *rest)


def digits_cnn() -> nn.Module:
    """Returns an untrained `DigitsCNN`."""
    return DigitsCNN()


def lenet() -> nn.Module:
    """Returns an untrained `LeNet`."""
    return LeNet()


def keras_mnist_cnn() -> nn.Module:
    """Returns an untrained `KerasMnistCNN`."""
    return KerasMnistCNN()


def resnet20(mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> nn.Module:
    """Returns an untrained `CifarResNet` of 20 layers (269,722 parameters).

    Args:
        mean: of the input's channels, subtracted first; the common release wants (0.485, 0.456, 0.406).
        std: of the input's channels; the common release wants (0.229, 0.224, 0.225).

    Raises:
        InputError: only one of them is given.
    """
    return CifarResNet(3, normalize_by(mean, std))


def digits_standard() -> nn.Module:
    """Returns the shipped digits network that was trained without defence, in eval mode."""
    return _trained("digits-standard")


def digits_at() -> nn.Module:
    """Returns the shipped digits network that was trained against PGD at linf 0.2, in eval mode."""
    return _trained("digits-at")


def _trained(name: str) -> nn.Module:
    from safetensors.torch import load_file

    model = DigitsCNN()
    model.load_state_dict(load_file(ASSETS / f"{name}.safetensors"))
    return model.eval()

"""Networks of the paper's experiments that no library has."""

from __future__ import annotations

from collections.abc import Callable

import torchvision
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3×3 convolutions and a skip, with a 1×1 convolution where the shape changes (option B)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            conv = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """The ResNet of 6n + 2 layers for 32×32 images (He et al., arXiv 1512.03385, section 4.2)."""

    def __init__(self, blocks: int, width: int, classes: int) -> None:
        super().__init__()
        first = 16 * width
        self.conv1 = nn.Conv2d(3, first, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(first, first, blocks, 1)
        self.layer2 = self._stage(first, 2 * first, blocks, 2)
        self.layer3 = self._stage(2 * first, 4 * first, blocks, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * first, classes)

    @staticmethod
    def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        rest = (Block(channels, channels, 1) for _ in range(blocks - 1))
        return nn.Sequential(Block(channels_in, channels, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.pool(x).flatten(1))


def resnet20(width: int = 4, classes: int = 10, blocks: int = 3) -> CifarResNet:
    """ResNet-20 of ``16 * width`` channels in its first stage: ×4 is the paper's; of 2 blocks a stage: ResNet-14."""
    return CifarResNet(blocks, width, classes)


def vgg11(width: int = 4, classes: int = 10) -> nn.Sequential:
    """VGG-11 with BatchNorm (arXiv 1409.1556, configuration A) for small images: ``16 * width`` channels at first.

    The last pooling is a mean over what is left of the map, and one linear layer follows.
    """
    layers: list[nn.Module] = []
    channels = 3
    for size in (1, 0, 2, 0, 4, 4, 0, 8, 8, 0, 8, 8):  # as shares of the first layer's; 0: a pooling
        if not size:
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(channels, 16 * width * size, 3, 1, 1, bias=False)]
        channels = 16 * width * size
        layers += [nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(nn.Sequential(*layers), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


RESNETS: dict[str, Callable[[int], nn.Module]] = {
    "resnet18": lambda classes: torchvision.models.resnet18(num_classes=classes),
    "resnet50": lambda classes: torchvision.models.resnet50(num_classes=classes),
    "resnet20x4": lambda classes: resnet20(4, classes),
}
"""Networks of some classes whose speed is measured, with random weights."""


def stage(channels_in: int, channels: int, stride: int = 1) -> nn.Sequential:
    """A 3×3 convolution, BatchNorm, and a ReLU that leaks, so that no channel dies."""
    conv = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.LeakyReLU(0.1))


class Autoencoder(nn.Module):
    """Images to images: three times down by strides, three times up by interpolation, all convolutional.

    The code of a 3×32×32 image is ``4 * width`` channels of 4×4.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.encoder = nn.Sequential(stage(3, width, 2), stage(width, 2 * width, 2), stage(2 * width, 4 * width, 2))
        up = (nn.Upsample(scale_factor=2), stage(4 * width, 2 * width), nn.Upsample(scale_factor=2))
        self.decoder = nn.Sequential(*up, stage(2 * width, width), nn.Upsample(scale_factor=2), stage(width, width))
        self.out = nn.Conv2d(width, 3, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.decoder(self.encoder(x)))

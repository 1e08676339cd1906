"""Networks of the paper's experiments that no library has."""

from __future__ import annotations

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


def resnet20(width: int = 4, classes: int = 10) -> CifarResNet:
    """ResNet-20 of ``16 * width`` channels in its first stage: ×4 is the paper's."""
    return CifarResNet(3, width, classes)

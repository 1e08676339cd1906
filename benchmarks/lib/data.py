"""Data sets as tensors, from the packed files that ``--data`` names or from torchvision's own folders.

Two need no file: scikit-learn's digits, and letters that are drawn here.
"""

from __future__ import annotations

import io
import string
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Raw = tuple[np.ndarray, np.ndarray]
"""Images (n, channels, height, width), and labels (n,)."""


@dataclass(frozen=True)
class Split:
    """Images (n, 3, size, size), float32, and labels (n,).

    Images have mean 0 and variance 1 over the training set, or lie in [0, 1] where that was asked for.
    """

    images: Tensor
    labels: Tensor

    def of_classes(self, classes: list[int]) -> Split:
        """The images of some classes, labelled by their place in the list."""
        mine = torch.isin(self.labels, torch.tensor(classes))
        position = torch.full((int(self.labels.max()) + 1,), -1)
        position[torch.tensor(classes)] = torch.arange(len(classes))
        return Split(self.images[mine], position[self.labels[mine]])

    def first(self, count: int) -> Split:
        """The first so many images, all where there are fewer."""
        return Split(self.images[:count], self.labels[:count])


def load_cifar10(data: Path, size: int = 32, standardise: bool = True) -> tuple[Split, Split]:
    """CIFAR-10's training and test set, resized by averaging.

    Args:
        data: A folder with ``cifar10.npz`` (JPEG files end to end), or one that torchvision downloaded to.
        size: 32, or a divisor of it.
        standardise: See `Split`.
    """
    packed = data / "cifar10.npz"
    raw = _packed(packed) if packed.exists() else _from_torchvision(data)
    return _splits([(_averaged(images, size), labels) for images, labels in raw], standardise)


def load_mnist(data: Path, size: int = 32, standardise: bool = True) -> tuple[Split, Split]:
    """MNIST's training and test set in three channels, with a border to 32 × 32, then resized by averaging.

    Args:
        data: As of `read_mnist`.
        size: 32, or a divisor of it.
        standardise: See `Split`.
    """
    padded = [(np.pad(images[:, None], [(0, 0), (0, 0), (2, 2), (2, 2)]), y) for images, y in read_mnist(data)]
    return _splits([(_averaged(images, size), labels) for images, labels in padded], standardise)


def load_digits(size: int = 32, standardise: bool = True) -> tuple[Split, Split]:
    """scikit-learn's digits, 8 × 8, interpolated, in three channels; four in five are for training."""
    from sklearn.datasets import load_digits as read

    found = read()
    images = torch.from_numpy(found.images).float()[:, None] / 16 * 255
    images = F.interpolate(images, size=(size, size), mode="bilinear")
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
    labels = found.target[order.numpy()]
    end = len(order) * 4 // 5
    return _splits([(images[order[:end]], labels[:end]), (images[order[end:]], labels[end:])], standardise)


def load_letters(
    size: int = 32, counts: Sequence[int] = (13000, 2600), standardise: bool = True
) -> tuple[Split, Split]:
    """The letters A to Z, drawn here in Pillow's own font: any colours, sizes, places and slants.

    Args:
        size: 32, or a divisor of it.
        counts: Images for training and for the test.
        standardise: See `Split`.
    """
    rng = np.random.default_rng(0)
    labels = [rng.integers(26, size=count) for count in counts]
    drawn = [np.stack([_letter(string.ascii_uppercase[label], rng) for label in part]) for part in labels]
    return _splits([(_averaged(images, size), part) for images, part in zip(drawn, labels, strict=True)], standardise)


def _letter(letter: str, rng: np.random.Generator) -> np.ndarray:
    """One letter (3, 32, 32), its colour well apart from the ground's."""
    from PIL import Image, ImageDraw, ImageFont

    ground, ink = rng.integers(256, size=(2, 3))
    while abs(int(ground.sum()) - int(ink.sum())) < 200:
        ground, ink = rng.integers(256, size=(2, 3))
    mask = Image.new("L", (32, 32))
    place = tuple(16 + rng.integers(-4, 5, size=2))
    font = ImageFont.load_default(int(rng.integers(18, 29)))
    ImageDraw.Draw(mask).text(place, letter, 255, font, anchor="mm")
    opaque = np.asarray(mask.rotate(float(rng.uniform(-20, 20)), Image.Resampling.BILINEAR)) / 255
    return (ground[:, None, None] * (1 - opaque) + ink[:, None, None] * opaque).astype(np.float32)


def read_mnist(data: Path) -> list[Raw]:
    """MNIST's training and test set as they are: (n, 28, 28), 0 to 255.

    Args:
        data: A folder with ``mnist.npz``, or one that torchvision downloaded to.
    """
    packed = data / "mnist.npz"
    if packed.exists():
        with np.load(packed) as archive:
            return [(archive[f"{part}_images"], archive[f"{part}_labels"]) for part in ("train", "test")]
    from torchvision.datasets import MNIST

    sets = [MNIST(str(data), train=train) for train in (True, False)]
    return [(s.data.numpy(), s.targets.numpy()) for s in sets]


def _averaged(images: np.ndarray, size: int) -> Tensor:
    """Images of 32 × 32, made smaller."""
    return F.avg_pool2d(torch.from_numpy(images).float(), 32 // size)


def _splits(raw: list[tuple[Tensor, np.ndarray]], standardise: bool) -> tuple[Split, Split]:
    """Training and test set from pixels of 0 to 255; one channel becomes three alike."""
    pixels = [images.expand(-1, 3, -1, -1) for images, _ in raw]
    labels = [torch.from_numpy(found.astype(np.int64)) for _, found in raw]
    mean, std = torch.zeros(1, 3, 1, 1), torch.full((1, 3, 1, 1), 255.0)
    if standardise:
        mean, std = pixels[0].mean((0, 2, 3), keepdim=True), pixels[0].std((0, 2, 3), keepdim=True)
    train, test = (Split((p - mean) / std, found) for p, found in zip(pixels, labels, strict=True))
    return train, test


def _packed(path: Path) -> list[Raw]:
    from PIL import Image

    found = []
    with np.load(path) as archive:
        for part in ("train", "test"):
            data, offsets = archive[f"{part}_jpeg"].tobytes(), archive[f"{part}_offsets"]
            images = [
                np.asarray(Image.open(io.BytesIO(data[start:end])).convert("RGB")) for start, end in pairwise(offsets)
            ]
            found.append((np.stack(images).transpose(0, 3, 1, 2), archive[f"{part}_labels"]))
    return found


def _from_torchvision(data: Path) -> list[Raw]:
    from torchvision.datasets import CIFAR10

    sets = [CIFAR10(str(data), train=train) for train in (True, False)]
    return [(s.data.transpose(0, 3, 1, 2), np.asarray(s.targets)) for s in sets]

"""Data sets as tensors, from the packed files that ``--data`` names or from torchvision's own folders."""

from __future__ import annotations

import io
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Split:
    """Images (n, 3, size, size), float32 of mean 0 and variance 1 over the training set, and labels (n,)."""

    images: Tensor
    labels: Tensor

    def of_classes(self, classes: list[int]) -> Split:
        """The images of some classes, labelled by their place in the list."""
        mine = torch.isin(self.labels, torch.tensor(classes))
        position = torch.full((int(self.labels.max()) + 1,), -1)
        position[torch.tensor(classes)] = torch.arange(len(classes))
        return Split(self.images[mine], position[self.labels[mine]])


def load_cifar10(data: Path, size: int = 32) -> tuple[Split, Split]:
    """CIFAR-10's training and test set, resized by averaging.

    Args:
        data: A folder with ``cifar10.npz`` (JPEG files end to end), or one that torchvision downloaded to.
        size: 32, or a divisor of it.
    """
    packed = data / "cifar10.npz"
    raw = _packed(packed) if packed.exists() else _from_torchvision(data)
    pixels = [F.avg_pool2d(torch.from_numpy(images).float(), 32 // size) for images, _ in raw]
    mean, std = pixels[0].mean((0, 2, 3), keepdim=True), pixels[0].std((0, 2, 3), keepdim=True)
    labels = [torch.from_numpy(found.astype(np.int64)) for _, found in raw]
    train, test = (Split((p - mean) / std, found) for p, found in zip(pixels, labels, strict=True))
    return train, test


def _packed(path: Path) -> list[tuple[np.ndarray, np.ndarray]]:
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


def _from_torchvision(data: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    from torchvision.datasets import CIFAR10

    sets = [CIFAR10(str(data), train=train) for train in (True, False)]
    return [(s.data.transpose(0, 3, 1, 2), np.asarray(s.targets)) for s in sets]

"""What the guides' examples share: scikit-learn's digits, and networks trained on some of the classes in seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fxzip.demo import DigitNet, load_digits

HALVES: dict[str, Sequence[int]] = {"low": range(5), "high": range(5, 10)}

digits = cache(load_digits)
"""Images (n, 1, 16, 16) and labels, to train on and held out."""


@cache
def fit(make: Callable[[int], nn.Module], classes: Sequence[int], epochs: int = 3) -> nn.Module:
    """Train a network on the digits of some classes; it has one output for each, in their order."""
    torch.manual_seed(classes[0])
    images, labels = digits().train.tensors
    mine = torch.isin(labels, torch.tensor(classes))
    images, labels = images[mine], labels[mine] - classes[0]
    model = make(len(classes)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.05)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


def digit_net(classes: int) -> nn.Module:
    """The small ResNet of `fxzip demo`."""
    return DigitNet(classes=classes)


def loader(batch_size: int = 128) -> DataLoader[Any]:
    """Images of all classes; the labels that come with them are not used."""
    return DataLoader(TensorDataset(*digits().train.tensors), batch_size=batch_size)


@torch.no_grad()
def accuracy(zipped: Any, tasks: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """How many of the held-out digits of its own classes each head gets right, in percent."""
    images, labels = digits().test.tensors
    found = {}
    for name, classes in tasks.items():
        mine = torch.isin(labels, torch.tensor(classes))
        right = zipped(images[mine], task=name).argmax(1) == labels[mine] - classes[0]
        found[name] = round(100 * right.double().mean().item(), 1)
    return found


@torch.no_grad()
def joint(zipped: Any) -> float:
    """How many held-out digits get the largest of all heads' logits at the right class, in percent.

    Harder than each task alone: nobody says which head to look at.
    """
    images, labels = digits().test.tensors
    right = torch.cat(zipped(images), 1).argmax(1) == labels
    return round(100 * right.double().mean().item(), 1)

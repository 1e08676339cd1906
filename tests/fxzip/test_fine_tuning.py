"""A merged network is a network: a hundred steps of training gain it as much as they gain its parents."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxzip

pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install 'fxzip[demo]'")
HALVES = {"low": range(5), "high": range(5, 10)}
STEPS = 100
Logits = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def digits() -> Any:
    from fxzip.demo import load_digits

    return load_digits()


def of(tensors: Sequence[Tensor], classes: range) -> tuple[Tensor, Tensor]:
    """The images of some classes, and their labels counted from 0."""
    images, labels = tensors
    mine = torch.isin(labels, torch.tensor(classes))
    return images[mine], labels[mine] - classes[0]


def train(network: nn.Module, tasks: dict[str, tuple[Logits, Tensor, Tensor]], steps: int, rate: float) -> None:
    torch.manual_seed(0)
    network.train()
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        for logits, images, labels in tasks.values():
            batch = torch.randint(len(images), (32,))
            F.cross_entropy(logits(images[batch]), labels[batch]).backward()
        optimizer.step()
    network.eval()


@torch.no_grad()
def loss(logits: Logits, images: Tensor, labels: Tensor) -> float:
    return float(F.cross_entropy(logits(images), labels))


@pytest.fixture(scope="module")
def parents(digits: Any) -> dict[str, nn.Module]:
    """Networks that have not learnt all yet."""
    from fxzip.demo import DigitNet

    found = {}
    for seed, (name, classes) in enumerate(HALVES.items()):
        torch.manual_seed(seed)
        found[name] = DigitNet(classes=5)
        train(found[name], {name: (found[name], *of(digits.train.tensors, classes))}, steps=25, rate=2e-3)
    return found


@pytest.fixture(scope="module")
def gains(digits: Any, parents: dict[str, nn.Module]) -> dict[str, float]:
    """By how much training alone lowers the parents' losses on held-out digits."""
    found = {}
    for name, parent in parents.items():
        alone, held_out = copy.deepcopy(parent), of(digits.test.tensors, HALVES[name])
        before = loss(alone, *held_out)
        train(alone, {name: (alone, *of(digits.train.tensors, HALVES[name]))}, STEPS, 1e-3)
        found[name] = before - loss(alone, *held_out)
    return found


@pytest.mark.parametrize("keep_norms", [False, True])
def test_it_gains_as_much_as_its_parents(
    digits: Any, parents: dict[str, nn.Module], gains: dict[str, float], keep_norms: bool
) -> None:
    refit = fxzip.RefitOptions(rounds=1, keep_norms=keep_norms)
    loader = digits.train.tensors[0].split(128)
    options: dict[str, Any] = {"method": "select", "names": tuple(HALVES), "progress": False, "verify": False}
    zipped = fxzip.zip(*parents.values(), loader, refit=refit, **options)
    assert all(p.requires_grad for p in zipped.parameters())
    logits = {name: (lambda x, name=name: zipped(x, task=name)) for name in HALVES}
    held_out = {name: of(digits.test.tensors, classes) for name, classes in HALVES.items()}
    before = {name: loss(logits[name], *held_out[name]) for name in HALVES}
    tasks = {name: (logits[name], *of(digits.train.tensors, classes)) for name, classes in HALVES.items()}
    train(zipped, tasks, STEPS, 1e-3)
    assert min(gains.values()) > 0.05  # there was something to learn
    for name, gain in gains.items():
        assert before[name] - loss(logits[name], *held_out[name]) > 0.9 * gain, name

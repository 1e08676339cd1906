"""Pairs of networks trained on disjoint halves of CIFAR-10's classes (ZipIt!, arXiv 2305.03053, section 5.1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.lib.data import Split
from benchmarks.lib.merges import percent
from benchmarks.lib.models import resnet20, vgg11
from benchmarks.lib.runs import CHECKPOINTS
from benchmarks.lib.training import train


@dataclass(frozen=True)
class Setting:
    """What a pair's training depends on."""

    width: int = 2
    size: int = 16
    epochs: int = 7
    bf16: bool = False
    blocks: int = 3
    vgg: bool = False

    @property
    def key(self) -> str:
        """A name for files."""
        other = f"_b{self.blocks}" if self.blocks != 3 else ""
        other += "_vgg11" if self.vgg else ""
        return f"w{self.width}_s{self.size}_e{self.epochs}{'_bf16' if self.bf16 else ''}{other}"

    def make(self) -> nn.Module:
        """A network for five classes, from the current seed."""
        return vgg11(self.width, 5) if self.vgg else resnet20(self.width, 5, self.blocks)


def halves(pair: int) -> tuple[list[int], list[int]]:
    """The classes of both tasks: 0-4 and 5-9 for pair 0, random halves for the others."""
    generator = torch.Generator().manual_seed(pair)
    order = list(range(10)) if pair == 0 else torch.randperm(10, generator=generator).tolist()
    return sorted(order[:5]), sorted(order[5:])


def calibration(split: Split, pair: int, images: int) -> list[Tensor]:
    """The batches that a pair's merges see: the first so many training images of an order drawn for the pair."""
    drawn = torch.randperm(len(split.images), generator=torch.Generator().manual_seed(pair))[:images]
    return list(split.images[drawn].split(125))


def models(
    setting: Setting, pair: int, split: Split, log: Callable[[str], None] = print
) -> tuple[nn.Module, nn.Module]:
    """Both networks of a pair, from their checkpoints if they were trained before."""
    return network(setting, pair, 0, split, log), network(setting, pair, 1, split, log)


def network(setting: Setting, pair: int, task: int, split: Split, log: Callable[[str], None] = print) -> nn.Module:
    """One network of a pair, from its checkpoint if it was trained before."""
    return train(
        setting.make,
        split.of_classes(halves(pair)[task]),
        seed=100 * pair + task,
        epochs=setting.epochs,
        bf16=setting.bf16,
        checkpoint=CHECKPOINTS / f"cifar_{setting.key}_pair{pair}_task{task}.pt",
        log=lambda text: log(f"pair {pair} task {task}: {text}"),
    )


@torch.no_grad()
def accuracies(network: Callable[[Tensor], Any], test: Split, classes: tuple[list[int], list[int]]) -> dict[str, float]:
    """Joint accuracy, each task's and their average, in percent."""
    outputs = [network(images) for images in test.images.split(1000)]
    heads = [torch.cat(parts) for parts in zip(*outputs, strict=True)]
    place = torch.empty(10, dtype=torch.int64)
    place[torch.tensor(classes[0] + classes[1])] = torch.arange(10)
    labels = place[test.labels]
    found = {"joint": percent(torch.cat(heads, 1).argmax(1) == labels)}
    for task, logits in enumerate(heads):
        mine = labels // 5 == task
        found[f"task{task}"] = percent(logits.argmax(1)[mine] == labels[mine] % 5)
    return found | {"average": (found["task0"] + found["task1"]) / 2}

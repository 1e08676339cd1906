"""One network made smaller without training, beside Torch-Pruning (arXiv 2301.12900).

    pip download --no-deps torch-pruning; unzip it, and add it to PYTHONPATH
    python -m benchmarks.pruning --data ../shared/data

A ResNet-20 ×2 of `benchmarks.cifar` at shares of its FLOPs: ``fxzip.shrink``, and Torch-Pruning by the magnitude of
groups and by their Taylor importance (global, in steps until the share is reached), as it leaves the network and with
BatchNorm statistics reset on the images that ``shrink`` gets. Taylor importance gets their labels, too. ``accuracy`` is
in percent of the task's test images. Figures go to benchmarks/results/pruning.json as they come.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import fxzip
from benchmarks.lib.command import CommandLine
from benchmarks.lib.data import Split, load_cifar10
from benchmarks.lib.machine import facts, timed
from benchmarks.lib.merges import percent
from benchmarks.lib.pairs import Setting, halves, network
from benchmarks.lib.runs import RESULTS, Kept, Row
from benchmarks.lib.tables import shown
from fxzip.passes.recalibrate import recalibrate

WAYS = ("fxzip.shrink", "magnitude", "magnitude, reset", "Taylor", "Taylor, reset")
STEPS = 50
"""Torch-Pruning takes channels in so many steps until the share is reached."""
LABELLED = 500
"""Images with labels whose gradients Taylor importance takes, anew at each step."""


@torch.no_grad()
def accuracy(model: nn.Module, test: Split) -> float:
    """In percent."""
    return percent(torch.cat([model(images) for images in test.images.split(1000)]).argmax(1) == test.labels)


class Only(nn.Module):
    """A shrunk network as one that gives a tensor."""

    def __init__(self, shrunk: fxzip.ZippedModel) -> None:
        super().__init__()
        self.shrunk = shrunk

    def forward(self, x: Tensor) -> Any:
        """The only head's output."""
        return self.shrunk(x, task="model")


def pruned(model: nn.Module, way: str, share: float, images: Split) -> tuple[nn.Module, float]:
    """A network by Torch-Pruning, and its share of the operations."""
    import torch_pruning as tp

    found, example = copy.deepcopy(model), images.images[:1]
    kinds = {"magnitude": tp.importance.GroupMagnitudeImportance, "Taylor": tp.importance.GroupTaylorImportance}
    importance = kinds[way.partition(",")[0]]()
    options = {"global_pruning": True, "pruning_ratio": 1.0, "iterative_steps": STEPS, "ignored_layers": [found.fc]}
    pruner = tp.pruner.MetaPruner(found, example, importance=importance, **options)
    whole, _ = tp.utils.count_ops_and_params(found, example)
    has = whole
    for _ in range(STEPS):
        if has <= share * whole:
            break
        if way.startswith("Taylor"):
            found.zero_grad()
            few = images.first(LABELLED)
            F.cross_entropy(found(few.images), few.labels).backward()
        pruner.step()
        has, _ = tp.utils.count_ops_and_params(found, example)
    found.zero_grad()
    if way.endswith("reset"):
        recalibrate(found, list(images.images.split(125)), progress=False)
    return found.eval(), float(has / whole)


def measure(model: nn.Module, way: str, share: float, images: Split, test: Split) -> Row:
    """The row of one way and share."""
    if way == "fxzip.shrink":
        loader = list(images.images.split(125))
        seconds, _, small = timed(lambda: fxzip.shrink(model, loader, budget=f"flops<={share}x", progress=False))
        flops, result = small.report.flops_after / small.report.flops_before, accuracy(Only(small), test)
    else:
        seconds, _, (network, flops) = timed(lambda: pruned(model, way, share, images))
        result = accuracy(network, test)
    return {"share": share, "method": way, "flops": flops, "accuracy": result, "seconds": seconds}


def rows(options: Namespace) -> Iterator[Row]:
    """What is missing."""
    train, test = load_cifar10(options.data, options.size)
    setting = Setting(options.width, options.size, options.epochs, options.bf16)
    classes = halves(options.pair)[options.task]
    model, mine = network(setting, options.pair, options.task, train), test.of_classes(classes)
    own = train.of_classes(classes)
    drawn = torch.randperm(len(own.images), generator=torch.Generator().manual_seed(0))[: options.images]
    images = Split(own.images[drawn], own.labels[drawn])
    if (1.0, "the network") not in options.kept:
        yield {"share": 1.0, "method": "the network", "flops": 1.0, "accuracy": accuracy(model, mine)}
    for share in map(float, options.shares):
        for way in options.methods:
            if (share, way) not in options.kept:
                yield measure(model, way, share, images, mine)


def main() -> None:
    """Run what is missing, write it, print all."""
    line = CommandLine(__doc__).training().several("methods", WAYS)
    line.several("shares", ("0.7", "0.5", "0.3"), "of the network's FLOPs")
    options = line.numbers(width=2, size=16, epochs=7, images=2_000, pair=1, task=1).read()
    options.kept = Kept(RESULTS / "pruning.json", facts("pruning", 1, "fxzip"), ("share", "method"))
    options.kept.extend(rows(options))
    Console(width=120).print(shown(options.kept.rows, "a ResNet-20 without training"))


if __name__ == "__main__":
    main()

"""Networks of the same classes, trained by others on non-IID shares of MNIST, merged into one.

    python -m benchmarks.fusion --data ../shared/data --images 400 5000

The MLPs (784-256-10) are those that arXiv 2507.00037 published. Accuracy is that of the mean of all heads' logits on
the test set, as the ensemble's is. Merges see balanced training images without labels. Figures go to
benchmarks/results/fusion.json as they come. The paper's KF-Linear, its own code run on 400 images, gives 95.64 for 4
networks and 94.88 for 8 (README of the data).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import fxzip
from benchmarks.lib.command import CommandLine
from benchmarks.lib.data import read_mnist
from benchmarks.lib.machine import facts, timed
from benchmarks.lib.merges import METHODS, measured, percent
from benchmarks.lib.runs import Kept, Row
from benchmarks.lib.tables import shown

OURS = (
    "average", "Git Re-Basin (weights)", "ZipIt!", "permute + refit", "zip + refit", "select + refit", "default"
)  # fmt: skip


def network(weights: dict[str, Tensor]) -> nn.Module:
    """An MLP with published weights."""
    width, biases = weights["1.weight"].shape[0], "1.bias" in weights
    layers = nn.Linear(784, width, bias=biases), nn.ReLU(), nn.Linear(width, 10, bias=biases)
    model = nn.Sequential(nn.Flatten(), *layers)
    model.load_state_dict(weights)
    return model.eval()


def load(data: Path) -> list[tuple[Tensor, Tensor]]:
    """Training and test images (n, 1, 28, 28), as the networks were trained on them, and labels."""
    return [
        (((torch.from_numpy(images).float() / 255 - 0.1307) / 0.3081)[:, None], torch.from_numpy(labels).long())
        for images, labels in read_mnist(data)
    ]


def balanced(images: Tensor, labels: Tensor, count: int) -> list[Tensor]:
    """Batches of as many images of each class, in random order."""
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for label in range(10):
        mine = (labels == label).nonzero()[:, 0]
        drawn.append(mine[torch.randperm(len(mine), generator=generator)[: count // 10]])
    chosen = torch.cat(drawn)
    return list(images[chosen[torch.randperm(len(chosen), generator=generator)]].split(50))


def measure(models: list[nn.Module], images: int, data: list[tuple[Tensor, Tensor]], done: Kept) -> Iterator[Row]:
    """A row for the ensemble and for each method that is not done."""
    (train, labels), (test, truth) = data

    def row(method: str, outputs: Any, seconds: float) -> Row:
        score = percent(torch.stack(list(outputs)).mean(0).argmax(1) == truth)
        return {"networks": len(models), "images": images, "method": method, "accuracy": score, "seconds": seconds}

    with torch.no_grad():
        if (len(models), images, "ensemble") not in done:
            yield row("ensemble", [model(test) for model in models], 0.0)
        loader = balanced(train, labels, images)
        for method in OURS:
            if (len(models), images, method) in done:
                continue
            seconds, _, zipped = timed(partial(fxzip.zip, *models, loader, progress=False, **METHODS[method]))
            yield {**row(method, zipped(test), seconds), **measured(zipped)}


def main() -> None:
    """Run what is missing, write it, print all."""
    line = CommandLine(__doc__).data("a folder with MNIST and published_mlps.pt")
    line.parser.add_argument("--images", type=int, nargs="+", default=[400, 5000])
    options = line.numbers(threads=1).results("fusion").read()
    published = torch.load(options.data / "published_mlps.pt", weights_only=True)
    data = load(options.data)
    kept = Kept(options.json, facts("fusion", options.threads, "fxzip"), ("networks", "images", "method"))
    for images in options.images:
        for weights in published.values():
            kept.extend(measure([network(one) for one in weights], images, data, kept))
    Console(width=160).print(shown(kept.rows, "MNIST in shares, published MLPs"))


if __name__ == "__main__":
    main()

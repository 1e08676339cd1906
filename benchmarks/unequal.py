"""A small network beside a large one, on disjoint halves of CIFAR-10's classes, in one network.

    python -m benchmarks.unequal --data ../shared/data --pairs 1 --images 2000

The second task's network is that of `benchmarks.cifar`, ResNet-20 ×2; the first one's is half as wide, or ResNet-14 of
the same width, or a VGG-11. The merged network is as wide and as deep as the large one. ``stitch``: one of them goes on
from the other's features (``fxzip.zip(..., stitch=True)``), within a budget of the mean network's FLOPs.
``flops`` are multiples of the ResNet-20's. ``behind 0`` and ``behind 1`` are in points of accuracy, of each network
alone. Figures go to benchmarks/results/unequal.json as they come.
"""

from __future__ import annotations

import itertools
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console
from torch import Tensor, nn

import fxzip
from benchmarks.lib.command import CommandLine
from benchmarks.lib.data import load_cifar10
from benchmarks.lib.machine import facts
from benchmarks.lib.merges import timed_merge, timed_zip
from benchmarks.lib.pairs import Setting, accuracies, calibration, halves, network
from benchmarks.lib.runs import RESULTS, Kept, Row
from benchmarks.lib.tables import shown

KINDS = {"narrow": lambda setting: replace(setting, width=setting.width // 2),
         "shallow": lambda setting: replace(setting, blocks=setting.blocks - 1),
         "vgg11": lambda setting: replace(setting, vgg=True)}  # fmt: skip
"""How the first task's network is smaller."""
WAYS: dict[str, dict[str, Any]] = {
    "select": {"method": "select"}, "zip": {"method": "zip"}, "default": {},
    **{f"stitch {budget}x": {"cut": f"flops<={budget}x", "stitch": True} for budget in (1.2, 1.5, 1.8)},
}  # fmt: skip


def observed(networks: Sequence[nn.Module], loader: list[Tensor]) -> fxzip.Prepared:
    """Both networks, observed once for all ways to merge them."""
    return fxzip.prepare(*networks, example_inputs=loader[0][:2]).observe(loader, progress=False)


def measure(setting: Setting, pair: int, kind: str, options: Namespace, wanted: list[str]) -> Iterator[Row]:
    """A row for each way to merge that is wanted."""
    train, test = load_cifar10(options.data, options.size)
    networks = [network(each, pair, task, train) for task, each in enumerate((KINDS[kind](setting), setting))]
    alone = accuracies(lambda x: tuple(each(x) for each in networks), test, halves(pair))
    loader = calibration(train, pair, options.images)
    prepared = None
    for way in wanted:
        if "stitch" in WAYS[way]:
            zipped, flops, seconds = timed_zip(networks, loader, **WAYS[way])
        else:
            prepared = prepared or observed(networks, loader)
            zipped, flops, seconds = timed_merge(prepared, **WAYS[way])
        found = accuracies(zipped, test, halves(pair))
        behind = {f"behind {task}": alone[f"task{task}"] - found[f"task{task}"] for task in (0, 1)}
        yield {"pair": pair, "first": kind, "images": options.images, "method": way, "flops": flops, "seconds": seconds,
               **{task: found[task] for task in ("task0", "task1")}, **behind}  # fmt: skip


def main() -> None:
    """Run what is missing, write it, print all."""
    line = CommandLine(__doc__).training().several("methods", WAYS, "ways to merge")
    line.several("kinds", KINDS, "how the first network is smaller").pairs(2)
    options = line.numbers(width=2, size=16, epochs=7, images=2_000).read()
    setting = Setting(options.width, options.size, options.epochs, options.bf16)
    kept = Kept(RESULTS / "unequal.json", facts("unequal", 1, "fxzip"), ("pair", "first", "images", "method"))
    for pair, kind in itertools.product(options.pairs, options.kinds):
        missing = [way for way in options.methods if (pair, kind, options.images, way) not in kept]
        if missing:
            kept.extend(measure(setting, pair, kind, options, missing))
    Console(width=160).print(shown(kept.rows, f"beside ResNet-20 {setting.key}"))


if __name__ == "__main__":
    main()

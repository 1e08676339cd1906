"""Pairs of ResNet-20 on disjoint halves of CIFAR-10's classes, merged in every way (the paper's Table 1a).

    python -m benchmarks.cifar --data ../shared/data --width 2 --size 16 [--pairs 1 2] [--jobs 2]

Networks are trained first, or read from benchmarks/checkpoints. The merges see unlabelled training images of all
classes. Each merge's figures go to benchmarks/results/cifar_SETTING.json as they come, so that a run can be taken up
again; means over the pairs go to benchmarks/results/cifar.json, which the docs show. Pair 0 is the one that options
were tuned on; the means are of the others, where there are any. With ``--jobs`` pairs run side by side.

Without refit every merge has its BatchNorm statistics reset, which is what REPAIR (Jordan et al., arXiv 2211.08403,
section 4.4) is for networks with BatchNorm.
"""

from __future__ import annotations

import itertools
import statistics
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console

import fxzip
from benchmarks.lib.command import CommandLine
from benchmarks.lib.data import load_cifar10
from benchmarks.lib.machine import facts, timed
from benchmarks.lib.merges import METHODS, in_order, measured, timed_merge
from benchmarks.lib.pairs import Setting, accuracies, calibration, halves, models
from benchmarks.lib.runs import RESULTS, Kept, Row, side_by_side, write
from benchmarks.lib.tables import shown

CUTS: dict[str, dict[str, Any]] = {
    "7 of 20": {"cut": "layer2"},
    "13 of 20": {"cut": "layer3"},
    "19 of 20": {},
    "8 to 19 of 20": {"start": "layer2"},
}
"""Layers that are merged: convolutions of the main path."""
ENSEMBLE = ("none", "ensemble")
"""The cut and the method of no merge at all."""
SCORES = ("joint", "task0", "task1", "average")


def measure_pair(setting: Setting, pair: int, options: Namespace, wanted: list[tuple[str, str]]) -> Iterator[Row]:
    """A row for the ensemble and for each cut and method that is wanted."""
    torch.set_num_threads(options.threads)
    train, test = load_cifar10(options.data, options.size)
    networks, classes = models(setting, pair, train), halves(pair)
    loader = calibration(train, pair, options.images)
    if ENSEMBLE in wanted:
        ensemble = accuracies(lambda x: tuple(network(x) for network in networks), test, classes)
        yield {"pair": pair, "cut": ENSEMBLE[0], "method": ENSEMBLE[1], "flops": 2.0, "seconds": 0.0, **ensemble}
    prepared = fxzip.prepare(*networks, example_inputs=loader[0][:2])
    observing, _, _ = timed(lambda: prepared.observe(loader, progress=False))
    for cut, name in (which for which in wanted if which != ENSEMBLE):
        zipped, flops, seconds = timed_merge(prepared, **CUTS[cut], **METHODS[name])
        scores = accuracies(zipped, test, classes)
        yield {"pair": pair, "cut": cut, "method": name, "flops": flops, "seconds": seconds + observing,
               **scores, **measured(zipped)}  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means and standard deviations over the pairs that nothing was tuned on, by cut and method."""
    held_out = [row for row in rows if row["pair"] > 0] or rows
    found = []
    for cut, name in dict.fromkeys((row["cut"], row["method"]) for row in held_out):
        mine = [row for row in held_out if (row["cut"], row["method"]) == (cut, name)]
        line = {"layers merged": cut, "method": name, "FLOPs": f"{statistics.mean(r['flops'] for r in mine):.2f}"}
        for score, title in zip(SCORES, ("joint", "task A", "task B", "average"), strict=True):
            line[title] = spread([row[score] for row in mine])
        found.append(line | {"merge_s": f"{statistics.mean(row['seconds'] for row in mine):.0f}"})
    return found


def spread(values: list[float]) -> str:
    """Mean ± standard deviation."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def main() -> None:
    """Run what is missing, write it, print all."""
    line = CommandLine(__doc__).training().several("cuts", CUTS, "layers that are merged")
    line.several("methods", METHODS, "ways to merge").pairs(3)
    options = line.numbers(width=2, size=16, epochs=7, images=10_000, jobs=1, threads=1).read()
    setting = Setting(options.width, options.size, options.epochs, options.bf16)
    about = facts("cifar", options.threads, "fxzip")
    kept = Kept(RESULTS / f"cifar_{setting.key}_i{options.images}.json", about, keys=("pair", "cut", "method"))
    every = [ENSEMBLE, *itertools.product(options.cuts, options.methods)]
    missing = {pair: [which for which in every if (pair, *which) not in kept] for pair in options.pairs}
    held_out_first = sorted(missing, key=lambda pair: pair == 0)
    calls = [(setting, pair, options, missing[pair]) for pair in held_out_first if missing[pair]]
    kept.extend(side_by_side(calls, measure_pair, options.jobs))
    lines = summary(in_order(kept.rows, CUTS, METHODS))
    tested = sorted({row["pair"] for row in kept.rows if row["pair"] > 0}) or [0]
    about |= {"setting": f"ResNet-20 {setting.key}, {options.images} images, pairs {tested}"}
    write(RESULTS / "cifar.json", {**about, "rows": lines})
    Console().print(shown(lines, about["setting"]))


if __name__ == "__main__":
    main()

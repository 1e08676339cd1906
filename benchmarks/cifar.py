"""Pairs of ResNet-20 on disjoint halves of CIFAR-10's classes, merged in every way (the paper's Table 1a).

    python -m benchmarks.cifar --data ../shared/data --width 2 --size 16 --pairs 1 [--bf16]

Networks are trained first, or read from benchmarks/checkpoints. The merges see unlabelled training images of all
classes. Results go to benchmarks/results/cifar_SETTING.json, pair by pair, so that a run can be taken up again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fxzip
from benchmarks.data import Split, load_cifar10
from benchmarks.pairs import Setting, halves, models

RESULTS = Path(__file__).parent / "results"
PAPER = {"alpha": 1e-4, "beta": 0.05}
METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("average", {"method": "average", "refit": False}),
    ("permute", {"method": "permute", "refit": False}),
    ("zip, paper's α and β", {"method": "zip", "refit": False, **PAPER}),
    ("zip, α = β = 1", {"method": "zip", "refit": False}),
    ("average + refit", {"method": "average"}),
    ("permute + refit", {"method": "permute"}),
    ("zip + refit (the default)", {}),
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


def percent(right: Tensor) -> float:
    """The share of true values in percent."""
    return 100 * right.double().mean().item()


def measure_pair(setting: Setting, pair: int, train: Split, test: Split, images: int) -> Iterator[dict[str, Any]]:
    """A row for the ensemble and for each method."""
    networks, classes = models(setting, pair, train), halves(pair)
    drawn = torch.randperm(len(train.images), generator=torch.Generator().manual_seed(pair))[:images]
    loader = list(train.images[drawn].split(125))
    ensemble = accuracies(lambda x: tuple(network(x) for network in networks), test, classes)
    prepared = fxzip.prepare(*networks, example_inputs=loader[0][:2])
    start = time.perf_counter()
    prepared.observe(loader, progress=False)
    observing = time.perf_counter() - start
    yield {"pair": pair, "method": "ensemble", "flops": None, "seconds": None, **ensemble}
    for name, options in METHODS:
        start = time.perf_counter()
        zipped = prepared.convert(progress=False, **options)
        seconds = time.perf_counter() - start + observing
        ratio = zipped.report.flops_after / zipped.report.before[0].flops
        yield {"pair": pair, "method": name, "flops": ratio, "seconds": seconds, **accuracies(zipped, test, classes)}


def table(rows: list[dict[str, Any]], title: str) -> Table:
    """The rows of all pairs, to print."""
    result = Table(title=title)
    for column in ("pair", "method", "FLOPs", "joint", "task A", "task B", "average", "seconds"):
        result.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        cost = "2.00" if row["flops"] is None else f"{row['flops']:.2f}"
        scores = (f"{row[key]:.1f}" for key in ("joint", "task0", "task1", "average"))
        seconds = "-" if row["seconds"] is None else f"{row['seconds']:.0f}"
        result.add_row(str(row["pair"]), row["method"], cost, *scores, seconds)
    return result


def main() -> None:
    """Run what is missing, write it, print all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    for name, default in (("width", 2), ("size", 16), ("epochs", 7), ("pairs", 3), ("images", 1000), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--bf16", action="store_true", help="train under bfloat16 autocast")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    setting = Setting(options.width, options.size, options.epochs, options.bf16)
    path = RESULTS / f"cifar_{setting.key}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    train, test = load_cifar10(options.data, options.size)
    for pair in range(options.pairs):
        if any(row["pair"] == pair for row in rows):
            continue
        rows += measure_pair(setting, pair, train, test, options.images)
        command = " ".join(["python -m benchmarks.cifar", *sys.argv[1:]])
        path.write_text(json.dumps({"command": command, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    Console().print(table(rows, f"CIFAR-10 halves, ResNet-20 {setting.key}, {options.images} images"))


if __name__ == "__main__":
    main()

"""Pairs of ResNet-20 on disjoint halves of CIFAR-10's classes, merged in every way (the paper's Table 1a).

    python -m benchmarks.cifar --data ../shared/data --width 2 --size 16 --pairs 3

Networks are trained first, or read from benchmarks/checkpoints. The merges see unlabelled training images of all
classes. Each merge's figures go to benchmarks/results/cifar_SETTING.json as they come, so that a run can be taken up
again; means over the pairs go to benchmarks/results/cifar.json, which the docs show. Pair 0 is the one that options
were tuned on; the means are of the others, where there are any.

Without refit every merge has its BatchNorm statistics reset, which is what REPAIR (Jordan et al., arXiv 2211.08403,
section 4.4) is for networks with BatchNorm.
"""

from __future__ import annotations

import argparse
import json
import statistics
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
CUTS = {"7 of 20": "layer2", "13 of 20": "layer3", "19 of 20": None}
"""Layers in the trunk: convolutions of the main path."""
METHODS: dict[str, dict[str, Any]] = {
    "average": {"method": "average", "refit": False},
    "Git Re-Basin (weights)": {"method": "weights", "refit": False},
    "permute": {"method": "permute", "refit": False},
    "MuDSC (dual)": {"method": "dual", "refit": False},
    "CCA-Merge": {"method": "cca", "refit": False},
    "ZipIt!": {"method": "zip", "refit": False, "alpha": 1e-4, "beta": 0.05},
    "zip, α = β = 1": {"method": "zip", "refit": False},
    "select, no refit": {"method": "select", "refit": False},
    "average + refit": {"method": "average"},
    "permute + refit": {"method": "permute"},
    "select + refit": {"method": "select"},
    "zip + refit (default)": {},
}
SCORES = ("joint", "task0", "task1", "average")


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


def measure_pair(
    setting: Setting, pair: int, train: Split, test: Split, images: int, cuts: list[str], done: set[tuple[Any, ...]]
) -> Iterator[dict[str, Any]]:
    """A row for the ensemble and for each cut and method that is not done."""
    wanted = [(cut, name) for cut in cuts for name in METHODS if (pair, cut, name) not in done]
    if not wanted:
        return
    networks, classes = models(setting, pair, train), halves(pair)
    drawn = torch.randperm(len(train.images), generator=torch.Generator().manual_seed(pair))[:images]
    loader = list(train.images[drawn].split(125))
    if (pair, "none", "ensemble") not in done:
        ensemble = accuracies(lambda x: tuple(network(x) for network in networks), test, classes)
        yield {"pair": pair, "cut": "none", "method": "ensemble", "flops": 2.0, "seconds": 0.0, **ensemble}
    prepared = fxzip.prepare(*networks, example_inputs=loader[0][:2])
    start = time.perf_counter()
    prepared.observe(loader, progress=False)
    observing = time.perf_counter() - start
    for cut, name in wanted:
        start = time.perf_counter()
        zipped = prepared.convert(cut=CUTS[cut], progress=False, **METHODS[name])
        seconds = time.perf_counter() - start + observing
        ratio = zipped.report.flops_after / zipped.report.before[0].flops
        scores = accuracies(zipped, test, classes)
        yield {"pair": pair, "cut": cut, "method": name, "flops": ratio, "seconds": seconds, **scores}


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


def table(lines: list[dict[str, Any]], title: str) -> Table:
    """The summary, to print."""
    result = Table(title=title)
    for column in lines[0]:
        result.add_column(column.replace("_", ", "), justify="left" if column == "method" else "right")
    for line in lines:
        result.add_row(*line.values())
    return result


def main() -> None:
    """Run what is missing, write it, print all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    for name, default in (("width", 2), ("size", 16), ("epochs", 7), ("pairs", 3), ("images", 1000), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    bf16 = torch.cpu._is_avx512_bf16_supported()
    text = "train under bfloat16 autocast (the default where the CPU has instructions for it)"
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=bf16, help=text)
    parser.add_argument("--cuts", nargs="+", choices=CUTS, default=list(CUTS), help="layers in the trunk")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    setting = Setting(options.width, options.size, options.epochs, options.bf16)
    path = RESULTS / f"cifar_{setting.key}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    done = {(row["pair"], row["cut"], row["method"]) for row in rows}
    facts = {
        "command": " ".join(["python -m benchmarks.cifar", *sys.argv[1:]]),
        "versions": {"torch": torch.__version__, "fxzip": fxzip.__version__},
        "threads": options.threads,
    }
    train, test = load_cifar10(options.data, options.size)
    for pair in range(options.pairs):
        for row in measure_pair(setting, pair, train, test, options.images, options.cuts, done):
            rows.append(row)
            path.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
            print(f"pair {pair}, {row['cut']}, {row['method']}: {row['average']:.1f}", flush=True)
    lines = summary(rows)
    tested = sorted({row["pair"] for row in rows if row["pair"] > 0}) or [0]
    facts |= {"setting": f"ResNet-20 {setting.key}, {options.images} images, pairs {tested}"}
    (RESULTS / "cifar.json").write_text(json.dumps({**facts, "rows": lines}, indent=1, ensure_ascii=False) + "\n")
    Console().print(table(lines, facts["setting"]))


if __name__ == "__main__":
    main()

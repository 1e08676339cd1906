"""What observing costs: its time over that of the models' plain forward passes, and its peak memory.

    python -m benchmarks.observe [--threads 1] [--repeats 5] [--points last]

Plain and observing passes over the same images alternate in one process, and the medians are compared.
Memory is the peak resident size of a fresh process that observes k batches, and 4k: they should be alike.
Writes benchmarks/results/observe.json.
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.lib.command import CommandLine
from benchmarks.lib.machine import facts, in_fresh_process, timed
from benchmarks.lib.models import RESNETS
from benchmarks.lib.runs import write
from benchmarks.lib.tables import printed

FEW, MANY = 4, 16

CASES = {"resnet18": (224, 16), "resnet50": (224, 16), "resnet20x4": (32, 64)}
"""Image and batch size, by the network's name."""


def setting(case: str) -> tuple[nn.Module, nn.Module, Callable[[int], list[Tensor]]]:
    """Two models from different seeds, in eval mode, and what makes a loader of so many batches."""
    build, (size, batch) = RESNETS[case], CASES[case]
    torch.manual_seed(0)
    models = build(10).eval(), build(7).eval()
    images = torch.randn(batch, 3, size, size)
    return *models, lambda count: [images] * count


def passes(case: str, points: str) -> tuple[Callable[[int], None], Callable[[int], None]]:
    """Two passes over some batches: plain and observing."""
    import fxzip

    a, b, loader = setting(case)
    prepared = fxzip.prepare(a, b, example_inputs=loader(1)[0][:2])

    @torch.no_grad()
    def plain(count: int) -> None:
        for images in loader(count):
            a(images)
            b(images)

    def observing(count: int) -> None:
        prepared.observe(loader(count), points=points, progress=False)

    return plain, observing


def measure_time(case: str, points: str, repeats: int, batches: int) -> dict[str, Any]:
    """Medians of alternating passes, after one of each that does not count."""
    plain, observing = passes(case, points)
    plain(1)
    observing(1)
    times = [(timed(lambda: plain(batches))[0], timed(lambda: observing(batches))[0]) for _ in range(repeats)]
    plains, observings = zip(*times, strict=True)
    median = statistics.median(plains), statistics.median(observings)
    ratios = [observed / alone for alone, observed in times]
    return {
        "plain_s": median[0],
        "observe_s": median[1],
        "ratio": median[1] / median[0],
        "ratio_range": [min(ratios), max(ratios)],
    }


def run_once(case: str, points: str, count: int) -> None:
    """Observe so many batches; plain passes if negative."""
    plain, observing = passes(case, points)
    plain(-count) if count < 0 else observing(count)


def measure(case: str, options: Namespace) -> dict[str, Any]:
    row = {"case": case, "image": CASES[case][0], "batch": CASES[case][1], "batches": options.batches}
    row |= measure_time(case, options.points, options.repeats, options.batches)
    for name, count in (("plain", -FEW), (f"observe_{FEW}", FEW), (f"observe_{MANY}", MANY)):
        ended = in_fresh_process(run_once, case, options.points, count, threads=options.threads)
        ended.result()
        row[f"peak_bytes_{name}"] = ended.peak_bytes
    return row


def table(rows: list[dict[str, Any]], title: str) -> Table:
    peaks = ("plain", f"observe_{FEW}", f"observe_{MANY}")
    memory = ("peak, plain", f"peak, {FEW} batches", f"peak, {MANY} batches")
    header = ("models", "images", "plain s", "observe s", "ratio", *memory)
    cells = [
        [
            row["case"],
            f"{row['batches']} x {row['batch']} at {row['image']}",
            *(f"{row[key]:.2f}" for key in ("plain_s", "observe_s", "ratio")),
            *(f"{row[f'peak_bytes_{name}'] / 2**20:.0f} MiB" for name in peaks),
        ]
        for row in rows
    ]
    return printed(title, header, cells)


def main() -> None:
    line = CommandLine(__doc__).numbers(threads=1, repeats=5).numbers("in each timed pass", batches=2)
    line.several("cases", CASES).results("observe")
    line.parser.add_argument("--points", choices=("last", "all"), default="last", help="default: %(default)s")
    options = line.read()
    rows = [measure(case, options) for case in options.cases]
    about = facts("observe", options.threads, "torchvision")
    write(options.json, {**about, "points": options.points, "repeats": options.repeats, "rows": rows})
    Console().print(table(rows, f"observing over plain passes, points={options.points}, {options.threads} thread(s)"))


if __name__ == "__main__":
    main()

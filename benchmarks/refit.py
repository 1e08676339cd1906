"""What merging with refit costs: seconds and peak memory of fxzip.zip, by its two parts, observing and merging.

    python -m benchmarks.refit [--threads 2] [--rounds 3 0] [--cases resnet20x4 resnet18 resnet50]

Two networks with random weights are merged in full on random images, by the defaults. Each case is a process of its
own, so that its peak resident size is its own, too. With ``rounds`` 0 each layer is solved once. Seconds are those of
the clock, and of the processor over all threads; other work on the machine (its load is in the row) makes the former
longer. Writes benchmarks/results/refit.json after each case; one that is in it, measured in the same setting, is not
run again.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import fxzip
from benchmarks.lib import tables
from benchmarks.lib.command import CommandLine
from benchmarks.lib.machine import Stopwatch, facts, in_fresh_process, peak_bytes
from benchmarks.lib.models import RESNETS
from benchmarks.lib.runs import Kept
from fxzip.passes.refit import RefitOptions

CASES = {"resnet20x4": (32, 1000, 100), "resnet18": (224, 512, 32), "resnet50": (224, 512, 32)}
"""Image size, images and batch size, by the network's name."""


class Images:
    """Random images, the same each time that they are read; made when they are asked for."""

    def __init__(self, count: int, size: int, batch: int) -> None:
        self.count, self.size, self.batch = count, size, batch

    def __len__(self) -> int:
        return -(-self.count // self.batch)

    def __getitem__(self, number: int) -> Tensor:
        if number >= len(self):
            raise IndexError(number)
        here = min(self.batch, self.count - number * self.batch)
        return torch.randn(here, 3, self.size, self.size, generator=torch.Generator().manual_seed(number))


def measure_here(case: str, rounds: int) -> dict[str, Any]:
    """A row: what fxzip.zip does, in its two parts, in this process."""
    build, (size, count, batch) = RESNETS[case], CASES[case]
    torch.manual_seed(0)
    models, images = (build(10).eval(), build(7).eval()), Images(count, size, batch)
    load, watch = os.getloadavg()[0], Stopwatch()
    prepared = fxzip.prepare(*models, example_inputs=images[0][:2]).observe(images, progress=False)
    observed, before = watch(), peak_bytes()
    zipped = prepared.convert(refit=RefitOptions(rounds=rounds), progress=False)
    total = watch()
    row = {
        "models": f"{case} twice",
        "images": f"{count} at {size}",
        "batch": batch,
        "rounds": rounds,
        "layers": zipped.report.refitted,
        "observe_s": observed[0],
        "refit_s": total[0] - observed[0],
        "total_s": total[0],
        "total_processor_s": total[1],
        "peak_bytes_observing": before,
        "peak_bytes": peak_bytes(),
        "load": [load, os.getloadavg()[0]],
    }
    finite = all(bool(out.isfinite().all()) for out in zipped(images[0][:4]))
    assert finite, f"{case}: refit gave numbers that are not finite"
    return row


def main() -> None:
    line = CommandLine(__doc__).numbers(threads=2).several("cases", CASES).results("refit")
    rounds_help = "of refit, 0 is faster; default: %(default)s"
    line.parser.add_argument("--rounds", type=int, nargs="+", default=[RefitOptions.rounds], help=rounds_help)
    options = line.read()
    about = facts("refit", options.threads, "torchvision")
    kept = Kept(options.json, about, keys=("models", "rounds"), same=("versions", "threads"))
    for case, rounds in itertools.product(options.cases, options.rounds):
        if (f"{case} twice", rounds) not in kept:
            kept.extend([in_fresh_process(measure_here, case, rounds, threads=options.threads).result()])
    Console().print(tables.plain(kept.rows), markup=False)


if __name__ == "__main__":
    main()

"""What merging with refit costs: seconds and peak memory of fxzip.zip, by its two parts, observing and merging.

    python -m benchmarks.refit [--threads 2] [--rounds 3 0] [--cases resnet20x4 resnet18 resnet50]

Two networks with random weights are merged in full on random images, by the defaults. Each case is a process of its
own, so that its peak resident size is its own, too. With ``rounds`` 0 each layer is solved once. Seconds are those of
the clock, and of the processor over all threads; other work on the machine (its load is in the row) makes the former
longer. Writes benchmarks/results/refit.json after each case; one that is in it, measured in the same setting, is not
run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from rich.console import Console
from torch import Tensor, nn

import fxzip
from benchmarks import tables
from benchmarks.models import resnet20
from fxzip.passes.refit import RefitOptions

RESULTS = Path(__file__).parent / "results" / "refit.json"

# name: (model of some classes, image size, images, batch size)
CASES: dict[str, tuple[Callable[[int], nn.Module], int, int, int]] = {
    "resnet20x4": (lambda classes: resnet20(4, classes), 32, 1000, 100),
    "resnet18": (lambda classes: torchvision.models.resnet18(num_classes=classes), 224, 512, 32),
    "resnet50": (lambda classes: torchvision.models.resnet50(num_classes=classes), 224, 512, 32),
}


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


def peak_bytes() -> int:
    """Peak resident bytes of this process."""
    # not ru_maxrss: a child process starts from its parent's peak
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024


class Stopwatch:
    """Seconds since it was made, by the clock and of the processor."""

    def __init__(self) -> None:
        self.start = time.perf_counter(), time.process_time()

    def __call__(self) -> tuple[float, float]:
        return time.perf_counter() - self.start[0], time.process_time() - self.start[1]


def measure_here(case: str, rounds: int) -> dict[str, Any]:
    """A row: what fxzip.zip does, in its two parts, in this process."""
    build, size, count, batch = CASES[case]
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


def in_fresh_process(case: str, rounds: int, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.refit", "--one", case, "--rounds", str(rounds)]
    command += ["--threads", str(threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    root = Path(__file__).parent.parent
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=root, env=environment)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def environment(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "command": " ".join(["python -m benchmarks.refit", *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {"torchvision": torchvision.__version__},
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": options.threads,
    }


def known_rows(path: Path, setting: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a file that was written with the same versions and threads; none if there is no such file."""
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    return list(found["rows"]) if all(found[key] == setting[key] for key in ("versions", "threads")) else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, nargs="+", default=[RefitOptions.rounds], help="of refit: 0 is faster")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        print(json.dumps(measure_here(options.one, options.rounds[0])))
        return
    setting = environment(options)
    rows = known_rows(options.json, setting)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    for case, rounds in itertools.product(options.cases, options.rounds):
        if not any(row["models"] == f"{case} twice" and row["rounds"] == rounds for row in rows):
            rows.append(in_fresh_process(case, rounds, options.threads))
            options.json.write_text(json.dumps({**setting, "rows": rows}, indent=2) + "\n")
    Console().print(tables.plain(rows), markup=False)


if __name__ == "__main__":
    main()

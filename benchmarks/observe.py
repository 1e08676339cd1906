"""What observing costs: its time over that of the models' plain forward passes, and its peak memory.

    python -m benchmarks.observe [--threads 1] [--repeats 5] [--points last]

Plain and observing passes over the same images alternate in one process, and the medians are compared.
Memory is the peak resident size of a fresh process that observes k batches, and 4k: they should be alike.
Writes benchmarks/results/observe.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.models import resnet20

RESULTS = Path(__file__).parent / "results" / "observe.json"
FEW, MANY = 4, 16

# name: (model of some classes, image size, batch size)
CASES: dict[str, tuple[Callable[[int], nn.Module], int, int]] = {
    "resnet18": (lambda classes: torchvision.models.resnet18(num_classes=classes), 224, 16),
    "resnet50": (lambda classes: torchvision.models.resnet50(num_classes=classes), 224, 16),
    "resnet20x4": (lambda classes: resnet20(4, classes), 32, 64),
}


def setting(case: str) -> tuple[nn.Module, nn.Module, Callable[[int], list[Tensor]]]:
    """Two models from different seeds, in eval mode, and what makes a loader of so many batches."""
    build, size, batch = CASES[case]
    torch.manual_seed(0)
    models = build(10).eval(), build(7).eval()
    images = torch.randn(batch, 3, size, size)
    return *models, lambda count: [images] * count


def prepare(case: str, points: str) -> tuple[nn.Module, nn.Module, Callable[[int], None], Callable[[int], None]]:
    """The models, and two passes over some batches: plain and observing."""
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

    return a, b, plain, observing


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure_time(case: str, points: str, repeats: int, batches: int) -> dict[str, Any]:
    """Medians of alternating passes, after one of each that does not count."""
    _, _, plain, observing = prepare(case, points)
    plain(1)
    observing(1)
    times = [(seconds(lambda: plain(batches)), seconds(lambda: observing(batches))) for _ in range(repeats)]
    plains, observings = zip(*times, strict=True)
    median = statistics.median(plains), statistics.median(observings)
    ratios = [observed / alone for alone, observed in times]
    return {
        "plain_s": median[0],
        "observe_s": median[1],
        "ratio": median[1] / median[0],
        "ratio_range": [min(ratios), max(ratios)],
    }


def peak_memory(case: str, points: str, count: int) -> int:
    """Peak resident bytes of this process after observing so many batches; plain passes if negative."""
    _, _, plain, observing = prepare(case, points)
    plain(-count) if count < 0 else observing(count)
    # not ru_maxrss: a child process starts from its parent's peak
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024


def in_fresh_process(case: str, points: str, count: int, threads: int) -> int:
    command = [sys.executable, "-m", "benchmarks.observe", "--memory", case, str(count)]
    command += ["--points", points, "--threads", str(threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    return int(done.stdout)


def measure(case: str, options: argparse.Namespace) -> dict[str, Any]:
    row = {"case": case, "image": CASES[case][1], "batch": CASES[case][2], "batches": options.batches}
    row |= measure_time(case, options.points, options.repeats, options.batches)
    for name, count in (("plain", -FEW), (f"observe_{FEW}", FEW), (f"observe_{MANY}", MANY)):
        row[f"peak_bytes_{name}"] = in_fresh_process(case, options.points, count, options.threads)
    return row


def table(rows: list[dict[str, Any]], title: str) -> Table:
    result = Table(title=title)
    memory = ("peak, plain", f"peak, {FEW} batches", f"peak, {MANY} batches")
    for column in ("models", "images", "plain s", "observe s", "ratio", *memory):
        result.add_column(column, justify="left" if column == "models" else "right")
    for row in rows:
        peaks = (row[f"peak_bytes_{name}"] for name in ("plain", f"observe_{FEW}", f"observe_{MANY}"))
        result.add_row(
            row["case"],
            f"{row['batches']} x {row['batch']} at {row['image']}",
            f"{row['plain_s']:.2f}",
            f"{row['observe_s']:.2f}",
            f"{row['ratio']:.2f}",
            *(f"{peak / 2**20:.0f} MiB" for peak in peaks),
        )
    return result


def environment(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "command": " ".join(["python -m benchmarks.observe", *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {"torchvision": torchvision.__version__},
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "points": options.points,
        "repeats": options.repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=2, help="batches in each timed pass")
    parser.add_argument("--points", choices=("last", "all"), default="last")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--memory", nargs=2, metavar=("CASE", "BATCHES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        print(peak_memory(options.memory[0], options.points, int(options.memory[1])))
        return
    rows = [measure(case, options) for case in options.cases]
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({**environment(options), "rows": rows}, indent=2) + "\n")
    Console().print(table(rows, f"observing over plain passes, points={options.points}, {options.threads} thread(s)"))


if __name__ == "__main__":
    main()

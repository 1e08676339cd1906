"""Past one process, and past one run: shared merges, resumed merges, merge after merge, and the memory that is told.

    python -m benchmarks.scale [--sections processes resumed repeated memory] [--images 384] [--merges 1000]

``processes``: two ResNet-20 in float64 are merged by one process and by two (torchrun, Gloo, a thread each) over the
same images; moments, maps and weights are compared, and the bytes counted that went from process to process. What 8
GPUs would take for a million images is projected from the parts, as the row says. ``resumed``: a merge is killed ten
times after a random time, and each time taken up again. ``repeated``: many merges of small networks in one process.
``memory``: what is estimated before a merge beside the peak. Writes benchmarks/results/scale.json.
"""

from __future__ import annotations

import argparse
import gc
import linecache
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

import fxzip
from benchmarks.lib import tables
from benchmarks.lib.command import CommandLine
from benchmarks.lib.machine import Stopwatch, facts, in_fresh_process, peak_bytes
from benchmarks.lib.models import RESNETS, resnet20
from benchmarks.lib.runs import Kept, Row
from benchmarks.refit import Images
from fxzip.flops import flop_counter
from fxzip.memory import need_of
from fxzip.passes.refit import RefitOptions

BATCH, SIZE = 32, 32
REFIT = RefitOptions(rounds=1, samples=2**14)
GPUS, MANY = 8, 1_000_000
RATE, BANDWIDTH = 1.5e13, 1e10
"""What the projection assumes of a GPU: operations in float32 and bytes sent, each second."""
KILLS = 10


def networks(double: bool = True) -> list[nn.Module]:
    """Two networks with random weights, the same in each process."""
    torch.manual_seed(0)
    made = [resnet20(1, classes).eval() for classes in (10, 7)]
    return [model.double() for model in made] if double else made


class Doubles(Images):
    """Images in float64."""

    def __getitem__(self, number: int) -> Any:
        return super().__getitem__(number).double()


# ---- several processes


def share(folder: Path, images: int) -> None:
    """What each of the processes does: the first one writes what came of it."""
    torch.set_num_threads(1)
    models, loader = networks(), Doubles(images, SIZE, BATCH)
    watch = Stopwatch()
    prepared = fxzip.prepare(*models, example_inputs=loader[0][:2])
    begun = watch()
    prepared.observe(loader, progress=False)
    observed, sent = watch(), dict(prepared.processes.traffic)
    plan = prepared.plan(method="zip")
    matched = watch()
    zipped = prepared.convert(method="zip", refit=REFIT, progress=False)
    done = watch()
    prepared.save(folder / "observed.safetensors")
    if not prepared.processes.leads:
        return
    maps = {f"{name}.{part}": getattr(found, part).clone() for name, found in plan.maps.items() for part in _PARTS}
    save_file({**maps, **{f"weights.{k}": v.clone() for k, v in zipped.state_dict().items()}}, folder / "merged")
    row: Row = {}
    for name, start, end in (("observing", begun, observed), ("matching", observed, matched), ("refit", matched, done)):
        row |= {f"{name}_s": end[0] - start[0], f"{name}_processor_s": end[1] - start[1]}
    row |= {"layers": zipped.report.refitted, "sent_observing": sum(sent.values())}
    row |= {"sent_in_all": sum(prepared.processes.traffic.values()), "peak_MB": peak_bytes() / 1e6}
    torch.save(row, folder / "row")


_PARTS = ("merge", "unmerge")


def measure_processes(options: argparse.Namespace) -> list[Row]:
    """One process and two, and what there is between them."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as place:
        for count in (1, 2):
            folder = Path(place, str(count))
            folder.mkdir()
            own = ["-m", "benchmarks.scale", "--share", str(folder), "--images", str(options.images)]
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
            load = os.getloadavg()[0]
            subprocess.run([*torchrun, *own], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            rows.append({"section": "processes", "processes": count, "load": load, **torch.load(folder / "row")})
        one, two = (Path(place, str(count)) for count in (1, 2))
        rows[1] |= compared(one, two)
    rows[1] |= {f"{key}_ratio": rows[0][key] / rows[1][key] for key in ("observing_processor_s", "refit_processor_s")}
    rows[1]["batches_on_each"] = -(-options.images // BATCH // 2)
    return [*rows, projected(rows[0], rows[1], options.images)]


def compared(one: Path, two: Path) -> Row:
    """How far two merges are apart, as shares of the largest value."""
    found: Row = {"maps_equal": True}
    for name, file in (("moments", "observed.safetensors"), ("weights", "merged")):
        first, second = (load_file(folder / file) for folder in (one, two))
        off = 0.0
        for key, tensor in first.items():
            if key.rpartition(".")[2] in _PARTS:
                found["maps_equal"] = found["maps_equal"] and torch.equal(tensor, second[key])
            elif key.startswith(("mean", "scatter", "weights")) and tensor.is_floating_point():
                off = max(off, float((tensor - second[key]).abs().max() / tensor.abs().max().clamp(min=1e-30)))
        found[f"{name}_off"] = off
    return found


def projected(one: Row, two: Row, images: int) -> Row:
    """What observing takes on several GPUs, from what was counted and measured here."""
    models, example = networks(double=False), torch.zeros(1, 3, SIZE, SIZE)
    with flop_counter() as counter, torch.no_grad():
        for model in models:
            model(example)
    doubles, watch = [model.double() for model in models], Stopwatch()
    with torch.no_grad():
        for batch in Doubles(images, SIZE, BATCH):
            for model in doubles:
                model(batch)
    ratio = one["observing_processor_s"] / watch()[1]
    flops = counter.get_total_flops()
    computing = ratio * flops * MANY / GPUS / RATE
    sending = 2 * two["sent_observing"] * (GPUS - 1) / GPUS / BANDWIDTH
    return {
        "section": "projected", "gpus": GPUS, "images": MANY, "flops_each": flops, "observing_by_forward": ratio,
        "rate": RATE, "bandwidth": BANDWIDTH, "computing_s": computing, "sending_s": sending,
        "arithmetic": f"{ratio:.2f} x {flops:.3g} x {MANY:,} / {GPUS} / {RATE:.2g} + "
        f"2 x {two['sent_observing']:,} x {GPUS - 1}/{GPUS} / {BANDWIDTH:.2g}",
    }  # fmt: skip


# ---- interruptions


def resumable(folder: str) -> None:
    """The merge that is killed; at the end its weights are in a file."""
    torch.set_num_threads(1)
    from fxzip import journal

    journal.EVERY = 0.2
    print("begun", flush=True)
    loader = Images(640, SIZE, BATCH)
    zipped = fxzip.zip(*networks(double=False), loader, method="zip", refit=REFIT, resume=folder, progress=False)
    save_file({name: value.clone() for name, value in zipped.state_dict().items()}, f"{folder}.merged")


def measure_resumed(options: argparse.Namespace) -> list[Row]:
    """Kill a merge after random times, and let it end."""
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "benchmarks.scale", "--resumable"]
        whole, kept = Path(place, "whole"), Path(place, "kept")
        watch = Stopwatch()
        subprocess.run([*command, str(whole)], check=True, stdout=subprocess.DEVNULL)
        unbroken, kills = watch()[0], 0
        start = time.perf_counter()
        while not Path(f"{kept}.merged").exists():
            running = subprocess.Popen([*command, str(kept)], stdout=subprocess.PIPE)
            assert running.stdout is not None
            running.stdout.readline()  # it has begun: starting Python takes most of a short run
            try:
                running.wait(None if kills >= KILLS else chance.uniform(1, 8))
            except subprocess.TimeoutExpired:
                running.send_signal(signal.SIGKILL)
                running.wait()
                kills += 1
        broken = time.perf_counter() - start
        first, second = (load_file(f"{path}.merged") for path in (whole, kept))
    same = all(torch.equal(first[name], second[name]) for name in first)
    return [{"section": "resumed", "kills": kills, "same_bits": same, "unbroken_s": unbroken, "in_all_s": broken}]


# ---- merge after merge


def small(seed: int) -> nn.Module:
    """A network that takes no time."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def repeated_here(merges: int) -> list[Row]:
    """Merge many times; after each tenth of them what there is in this process."""
    x, rows = torch.rand(24, 6), []
    for number in range(1, merges + 1):
        given = small(2 * number), small(2 * number + 1)
        fxzip.zip(*given, [x[:12], x[12:]], method="zip", refit=RefitOptions(rounds=1), progress=False)
        if number % (merges // 10) == 0:
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            row: Row = {"section": "repeated", "merges": number}
            row |= {"resident_MB": pages * os.sysconf("SC_PAGE_SIZE") / 1e6, "lines": len(linecache.cache)}
            row |= {"objects": len(gc.get_objects()), "threads": threading.active_count()}
            rows.append(row | {"files": len(os.listdir("/proc/self/fd"))})
    return rows


# ---- memory


def memory_here(name: str, size: int, images: int) -> Row:
    """What is estimated of a merge, and the peak of this process beyond where it began."""
    torch.manual_seed(0)
    models, loader = [RESNETS[name](classes).eval() for classes in (10, 7)], Images(images, size, BATCH)
    refit = RefitOptions(rounds=1, memory=64 * 2**20, least_images=BATCH)
    weights = sum(t.nbytes for model in models for t in (*model.parameters(), *model.buffers()))
    before = peak_bytes() - weights
    prepared = fxzip.prepare(*models, example_inputs=loader[0][:2])
    need = need_of(prepared, refit)
    prepared.observe(loader, progress=False).convert(method="zip", refit=refit, progress=False)
    found: Row = {"section": "memory", "models": f"{name} twice", "images": f"{images} at {size}"}
    return found | {"estimated_MB": need.total / 1e6, "parts": str(need), "peak_MB": (peak_bytes() - before) / 1e6}


def measure_repeated(options: argparse.Namespace) -> list[Row]:
    return in_fresh_process(repeated_here, options.merges).result()


def measure_memory(options: argparse.Namespace) -> list[Row]:
    return [in_fresh_process(memory_here, "resnet18", 64, 128, threads=options.threads).result()]


SECTIONS = {
    "processes": measure_processes,
    "resumed": measure_resumed,
    "repeated": measure_repeated,
    "memory": measure_memory,
}


def main() -> None:
    line = CommandLine(__doc__).numbers(threads=1, images=384, merges=1000).several("sections", SECTIONS)
    line.results("scale").parser.add_argument("--share", type=Path, help=argparse.SUPPRESS)
    line.parser.add_argument("--resumable", help=argparse.SUPPRESS)
    options = line.read()
    if options.share is not None:
        return share(options.share, options.images)
    if options.resumable is not None:
        return resumable(options.resumable)
    kept = Kept(options.json, facts("scale", options.threads), keys=("section",), same=("versions", "threads"))
    for name in options.sections:
        if (name,) not in kept:
            kept.extend(SECTIONS[name](options))
    Console().print(tables.by_section(kept.rows), markup=False)
    return None


if __name__ == "__main__":
    main()

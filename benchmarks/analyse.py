"""Seconds to trace and to analyse a network, beside Torch-Pruning's dependency graph and groups.

    python -m benchmarks.analyse [--repeats 5] [--models resnet18 ...]

Ours and theirs alternate in one process per model, on one thread, after one of each that does not count; the medians
are reported, in wall and in CPU seconds (of which a busy machine changes little). Theirs is
``DependencyGraph().build_dependency(model, x)`` and all its groups, tried first in a process of its own, which is
ended after `LIMIT` seconds. Ours is the analysis of the traced graph; tracing, which checks the graph against the
model at two batch sizes, is reported beside it. Large networks are on the meta device. Writes
benchmarks/results/analyse.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import fx, nn

RESULTS = Path(__file__).parent / "results" / "analyse.json"
MODELS = (
    "resnet18", "resnet50", "densenet121", "mobilenetv3_large_100", "efficientnet_b0", "convnext_atto",
    "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "maxvit_pico_rw_256", "coatnet_0_rw_224",
)  # fmt: skip
LARGE = ("vit_large_patch16_224", "convnext_xlarge")
DEPTHS = (6, 12, 24, 48, 96)
LIMIT = 60.0

Row = dict[str, Any]


def build(name: str, device: str = "cpu", **options: Any) -> tuple[nn.Module, torch.Tensor]:
    """A model of timm with random weights in eval mode, and an image of its size."""
    torch.manual_seed(0)
    with torch.device(device):
        model = timm.create_model(name, **options).eval()
        return model, torch.randn(1, *model.default_cfg["input_size"])


def seconds(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """Wall and CPU seconds, and the result."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return time.perf_counter() - wall, time.process_time() - cpu, result


def warm_up() -> None:
    """Import, once, what tracing imports of torch's compiler."""
    from fxzip.passes.trace import trace

    trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), (torch.randn(1, 3, 8, 8),))


def trace_one(model: nn.Module, x: torch.Tensor) -> fx.GraphModule:
    from fxzip.passes.canonicalise import canonicalise
    from fxzip.passes.trace import trace

    return canonicalise(trace(model, (x,)))


def theirs(model: nn.Module, x: torch.Tensor) -> int:
    """Torch-Pruning's graph and groups; the number of groups."""
    import torch_pruning

    graph = torch_pruning.DependencyGraph().build_dependency(model, x)
    return len(list(graph.get_all_groups()))


def medians(times: list[tuple[float, float]], name: str) -> Row:
    walls, cpus = zip(*times, strict=True)
    return {f"{name}_s": statistics.median(walls), f"{name}_cpu_s": statistics.median(cpus)}


def measure(name: str, repeats: int, with_theirs: bool, device: str = "cpu", **options: Any) -> Row:
    """One row. Each tracing is of a model made anew, as a user's is."""
    from fxzip.passes.analyse import analyse_graph

    warm_up()
    model, x = build(name, device, **options)
    graph, spec = None, None
    traces, ours, other = [], [], []
    for number in range(repeats + 1):
        *traced, graph = seconds(lambda: trace_one(model, x))
        *analysed, spec = seconds(lambda graph=graph: analyse_graph(graph, (x,), {}))
        pruned = seconds(lambda: theirs(model, x))[:2] if with_theirs else None
        if number:
            traces.append(traced)
            ours.append(analysed)
            other += [pruned] if pruned else []
    row = {"model": name, "device": device, "nodes": len(graph.graph.nodes), "spaces": len(spec.spaces)}
    row |= {"coverage": spec.coverage, **options, **medians(traces, "trace"), **medians(ours, "analyse")}
    return row | (medians(other, "theirs") if other else {"theirs_s": None, "theirs_cpu_s": None})


def in_child(arguments: list[str], limit: float | None = None) -> str | None:
    """The output of this program in a process of its own; None if that does not end in time or fails."""
    command = [sys.executable, "-m", "benchmarks.analyse", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=Path(__file__).parent.parent)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        print(done.stderr.splitlines()[-1] if done.stderr else arguments, file=sys.stderr)
        return None
    return done.stdout.splitlines()[-1]


def compare(name: str, repeats: int) -> Row:
    ends = in_child(["--theirs", name], LIMIT) is not None
    found = in_child(["--one", json.dumps({"name": name, "repeats": repeats, "with_theirs": ends})])
    assert found is not None, f"{name} could not be analysed"
    row: Row = json.loads(found)
    if not ends:
        row["theirs"] = f"failed, or did not end in {LIMIT:.0f} s"
    return row


def alone(name: str, repeats: int, **options: Any) -> Row:
    chosen = {"name": name, "repeats": repeats, "with_theirs": False, "device": "meta", **options}
    found = in_child(["--one", json.dumps(chosen)])
    assert found is not None, f"{name} could not be analysed"
    row: Row = json.loads(found)
    return row


def growth(rows: list[Row]) -> Row:
    """The p of seconds ~ nodes^p, by least squares and from the two largest."""
    nodes, times = (np.log([row[key] for row in rows]) for key in ("nodes", "analyse_cpu_s"))
    last = (times[-1] - times[-2]) / (nodes[-1] - nodes[-2])
    return {"all": float(np.polyfit(nodes, times, 1)[0]), "largest_two": float(last)}


def summary(rows: list[Row]) -> Row:
    """Medians; a run of theirs that did not end counts as one that takes longer than all others."""
    found: Row = {}
    for key in ("trace_s", "trace_cpu_s", "analyse_s", "analyse_cpu_s", "theirs_s", "theirs_cpu_s"):
        values = [float("inf") if row[key] is None else row[key] for row in rows]
        median = statistics.median(values)
        found[f"median_{key}"] = None if median == float("inf") else median
    both = [row for row in rows if row["theirs_s"] is not None]
    for key in ("analyse_s", "analyse_cpu_s", "theirs_s", "theirs_cpu_s") if both else ():
        found[f"median_{key}_where_theirs_ends"] = statistics.median(row[key] for row in both)
    return found | {"longest_analyse_s": max(row["analyse_s"] for row in rows)}


def table(rows: list[Row], title: str) -> Table:
    made = Table(title=title)
    columns = ("trace_s", "trace_cpu_s", "analyse_s", "analyse_cpu_s", "theirs_s", "theirs_cpu_s")
    for column in ("model", "nodes", "spaces", *(c.replace("_s", "").replace("_", " ") for c in columns)):
        made.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        shown = ["-" if row[key] is None else f"{row[key]:.3f}" for key in columns]
        made.add_row(row["model"], str(row["nodes"]), str(row["spaces"]), *shown)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--theirs", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one or options.theirs:
        warnings.simplefilter("ignore")
        print(json.dumps(measure(**json.loads(options.one)) if options.one else theirs(*build(options.theirs))))
        return
    import torch_pruning

    rows = [compare(name, options.repeats) for name in options.models]
    large = [alone(name, 1) for name in LARGE]
    depths = [alone("vit_tiny_patch16_224", options.repeats, depth=depth) for depth in DEPTHS]
    console = Console(width=120)
    console.print(table(rows, "seconds: trace, analyse, and Torch-Pruning's graph and groups; one thread"))
    console.print(table(large + depths, "on the meta device: large networks, and ViTs of more and more blocks"))
    result = {
        "command": " ".join(["python -m benchmarks.analyse", *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {"timm": timm.__version__, "torch_pruning": torch_pruning.__version__},
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "repeats": options.repeats,
        "summary": summary(rows),
        "growth": growth(depths),
        "rows": rows,
        "large": large,
        "depths": depths,
    }
    console.print(result["summary"], result["growth"])
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

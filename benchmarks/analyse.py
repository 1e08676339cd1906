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

import gc
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import fx, nn

from benchmarks.lib.command import CommandLine
from benchmarks.lib.machine import Bounds, facts, in_fresh_process, timed
from benchmarks.lib.runs import Row, write
from benchmarks.lib.tables import printed

MODELS = (
    "resnet18", "resnet50", "densenet121", "mobilenetv3_large_100", "efficientnet_b0", "convnext_atto",
    "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "maxvit_pico_rw_256", "coatnet_0_rw_224",
)  # fmt: skip
LARGE = ("vit_large_patch16_224", "convnext_xlarge")
DEPTHS = (6, 12, 24, 48, 96)
LIMIT = 60.0


def build(name: str, device: str = "cpu", **options: Any) -> tuple[nn.Module, torch.Tensor]:
    """A model of timm with random weights in eval mode, and an image of its size."""
    torch.manual_seed(0)
    with torch.device(device):
        model = timm.create_model(name, **options).eval()
        return model, torch.randn(1, *model.default_cfg["input_size"])


def seconds(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """Wall and CPU seconds, and the result."""
    gc.collect()
    return timed(run)


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
    warnings.simplefilter("ignore")
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


def theirs_alone(name: str) -> int:
    return theirs(*build(name))


def compare(name: str, repeats: int) -> Row:
    tried = in_fresh_process(theirs_alone, name, bounds=Bounds(seconds=LIMIT))
    row = in_fresh_process(measure, name, repeats, tried.error is None).result()
    return row if tried.error is None else row | {"theirs": f"failed, or did not end in {LIMIT:.0f} s"}


def alone(name: str, repeats: int, **options: Any) -> Row:
    """The row of a network on the meta device."""
    return in_fresh_process(partial(measure, **options), name, repeats, False, "meta").result()


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
    columns = ("trace_s", "trace_cpu_s", "analyse_s", "analyse_cpu_s", "theirs_s", "theirs_cpu_s")
    header = ("model", "nodes", "spaces", *(c.replace("_s", "").replace("_", " ") for c in columns))
    cells = [
        [row["model"], str(row["nodes"]), str(row["spaces"])]
        + ["-" if row[key] is None else f"{row[key]:.3f}" for key in columns]
        for row in rows
    ]
    return printed(title, header, cells)


def main() -> None:
    line = CommandLine(__doc__).numbers(repeats=5).results("analyse")
    line.parser.add_argument("--models", nargs="+", default=list(MODELS), help="of timm, beside Torch-Pruning")
    options = line.read()
    rows = [compare(name, options.repeats) for name in options.models]
    large = [alone(name, 1) for name in LARGE]
    depths = [alone("vit_tiny_patch16_224", options.repeats, depth=depth) for depth in DEPTHS]
    console = Console(width=120)
    console.print(table(rows, "seconds: trace, analyse, and Torch-Pruning's graph and groups; one thread"))
    console.print(table(large + depths, "on the meta device: large networks, and ViTs of more and more blocks"))
    result = {
        **facts("analyse", 1, "timm", "torch_pruning"),
        "repeats": options.repeats,
        "summary": summary(rows),
        "growth": growth(depths),
        "rows": rows,
        "large": large,
        "depths": depths,
    }
    console.print(result["summary"], result["growth"])
    write(options.json, result)


if __name__ == "__main__":
    main()

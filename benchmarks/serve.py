"""What a merged network costs to serve: its time over that of both originals, and of one head over one original.

    python -m benchmarks.serve [--threads 1] [--repeats 15] [--backends eager onnxruntime compile]

The networks have random weights and are merged in full, by the default (refit, which folds BatchNorm away), by the
paper's rule (which keeps it), and 1.15 times as wide. All contenders take turns in one process, and the medians of the
ratios of each turn are reported: a busy machine slows all of them. Writes benchmarks/results/serve.json.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fxzip
from benchmarks.lib.command import CommandLine
from benchmarks.lib.machine import facts, timed
from benchmarks.lib.runs import Row, write
from benchmarks.lib.tables import printed

MODELS = ("resnet18", "resnet50")
BATCHES = (1, 16)
BACKENDS = ("eager", "onnxruntime", "compile")
MERGES: dict[str, dict[str, Any]] = {"refit": {}, "paper's rule": {"refit": False}, "width 1.15": {"width": 1.15}}

Contenders = dict[str, Callable[[Tensor], object]]


def networks(name: str, options: Mapping[str, Any]) -> tuple[nn.Module, nn.Module, fxzip.ZippedModel]:
    """Two originals of different tasks, and their merge."""
    torch.manual_seed(0)
    build = getattr(torchvision.models, name)
    a, b = build(num_classes=10).eval(), build(num_classes=7).eval()
    loader = [torch.randn(4, 3, 224, 224)]
    return a, b, fxzip.zip(a, b, loader, progress=False, **options)


def eager(a: nn.Module, b: nn.Module, zipped: fxzip.ZippedModel) -> Contenders:
    task = zipped.names[0]
    return {
        "both": lambda x: (a(x), b(x)),
        "merged": zipped,
        "one": a,
        "head": lambda x: zipped(x, task=task),
    }


def compiled(a: nn.Module, b: nn.Module, zipped: fxzip.ZippedModel) -> Contenders:
    """Each of the four as a user would compile it."""
    fast_a, fast_b, fast = torch.compile(a), torch.compile(b), torch.compile(zipped)
    head = torch.compile(lambda x: zipped(x, task=zipped.names[0]))
    return {"both": lambda x: (fast_a(x), fast_b(x)), "merged": fast, "one": fast_a, "head": head}


def onnx(a: nn.Module, b: nn.Module, zipped: fxzip.ZippedModel, folder: Path) -> Contenders:
    """The originals by torch's exporter, the merged network and one head by ours."""
    batch = {0: torch.export.Dim("batch", min=1, max=1024)}
    for name, model in (("a", a), ("b", b)):
        path = str(folder / f"{name}.onnx")
        x = torch.randn(2, 3, 224, 224)
        torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=(batch,), verbose=False)
    zipped.export(folder / "merged.onnx")
    zipped.export(folder / "head.onnx", task=zipped.names[0])
    run = {name: _session(folder / f"{name}.onnx") for name in ("a", "b", "merged", "head")}
    return {"both": lambda x: (run["a"](x), run["b"](x)), "merged": run["merged"], "one": run["a"], "head": run["head"]}


def _session(path: Path) -> Callable[[Tensor], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (only,) = session.get_inputs()
    return lambda x: session.run(None, {only.name: x.numpy()})


@torch.no_grad()
def measure(contenders: Contenders, batch: int, repeats: int) -> Row:
    """Medians over turns, after two that do not count."""
    x = torch.randn(batch, 3, 224, 224)
    calls = {name: partial(run, x) for name, run in contenders.items()}
    turns = [{name: 1000 * timed(call)[0] for name, call in calls.items()} for _ in range(repeats + 2)][2:]
    row: Row = {f"{name}_ms": statistics.median(turn[name] for turn in turns) for name in contenders}
    row["merged_over_both"] = statistics.median(turn["merged"] / turn["both"] for turn in turns)
    row["head_over_one"] = statistics.median(turn["head"] / turn["one"] for turn in turns)
    return row


def rows_of(name: str, merge: str, backend: str, options: Namespace) -> list[Row]:
    parts = networks(name, MERGES[merge])
    with tempfile.TemporaryDirectory() as folder:
        if backend == "onnxruntime":
            contenders = onnx(*parts, Path(folder))
        else:
            contenders = (compiled if backend == "compile" else eager)(*parts)
        found = []
        for batch in options.batches:
            try:
                row = measure(contenders, batch, options.repeats if batch == 1 else max(5, options.repeats // 3))
            except Exception as error:  # torch.compile needs a C++ compiler that it can work with
                row = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
            found.append({"model": name, "merge": merge, "backend": backend, "batch": batch, **row})
            print(found[-1], file=sys.stderr)
        return found


def table(rows: list[Row]) -> Table:
    numbers = ("both_ms", "merged_ms", "merged_over_both", "one_ms", "head_ms", "head_over_one")
    cells = [
        [row["model"], row["merge"], row["backend"], str(row["batch"])]
        + [f"{row[n]:.3f}" if n.endswith(("both", "one")) else f"{row[n]:.1f}" for n in numbers if n in row]
        for row in rows
    ]
    title = "milliseconds and ratios: merged / both originals, one head / one original"
    return printed(title, ("model", "merge", "by", "batch", *(n.replace("_", " ") for n in numbers)), cells, (0, 1, 2))


def main() -> None:
    line = CommandLine(__doc__).numbers(threads=1, repeats=15).results("serve")
    line.several("models", MODELS).several("backends", BACKENDS).several("merges", MERGES)
    line.parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES), help="default: %(default)s")
    options = line.read()
    rows = [
        row
        for backend in options.backends
        for name in options.models
        for merge in options.merges
        for row in rows_of(name, merge, backend, options)
    ]
    Console(width=120).print(table(rows))
    about = facts("serve", options.threads, "torchvision")
    write(options.json, {**about, "repeats": options.repeats, "rows": rows})


if __name__ == "__main__":
    main()

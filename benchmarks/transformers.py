"""Pairs of small transformers on disjoint tasks, merged in every way: does what merges convolutions merge attention?

    python -m benchmarks.transformers --data ../shared/data [--threads 1] [--only vit gpt]

``vit``: two vision transformers on the MNIST digits 0-4 and 5-9 (28×28, patches of 7×7).
``gpt``: two language models of characters, one on English prose (the topics of Python's own help), the other on
Python code (its standard library, without comments and docstrings). Both texts come with every Python.

Each network is trained from its own seed, for some two minutes, or read from benchmarks/checkpoints. The merges see
unlabelled training inputs of both tasks. Writes benchmarks/results/transformers.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Generator, Tensor
from torch.nn import functional as F

import fxzip
from benchmarks.lib.command import CommandLine
from benchmarks.lib.machine import facts
from benchmarks.lib.merges import timed_merge
from benchmarks.lib.runs import CHECKPOINTS, write
from benchmarks.lib.small_transformers import Setting, Task, gpt, trained, vit
from benchmarks.lib.tables import printed

METHODS = ("average", "permute", "zip", "select")


@torch.no_grad()
def scores(network: Callable[[Tensor], Tensor], task: Task) -> dict[str, float]:
    """Accuracy in percent and cross-entropy in nats on a task's test set."""
    right = loss = 0.0
    inputs, labels = task.test
    for x, y in zip(inputs.split(500), labels.split(500), strict=True):
        logits = network(x).flatten(0, -2)
        right += float((logits.argmax(-1) == y.flatten()).sum())
        loss += float(F.cross_entropy(logits, y.flatten(), reduction="sum"))
    return {"accuracy": 100 * right / labels.numel(), "loss": loss / labels.numel()}


def _row(
    name: str, cut: str | None, found: list[dict[str, float]], flops: float | None, seconds: float
) -> dict[str, Any]:
    row: dict[str, Any] = {"method": name, "cut": cut, "flops": flops, "seconds": seconds, "tasks": found}
    return row | {key: sum(f[key] for f in found) / len(found) for key in ("accuracy", "loss")}


def measure(name: str, setting: Setting, seed: int = 0) -> Iterator[dict[str, Any]]:
    """A row for the networks alone, and one for each merge."""
    models = [
        trained(setting, task, seed + n, CHECKPOINTS / f"transformers_{name}_{seed + n}.pt")
        for n, task in enumerate(setting.tasks)
    ]
    yield _row("alone", None, [scores(m, t) for m, t in zip(models, setting.tasks, strict=True)], None, 0.0)
    g = Generator().manual_seed(seed)
    drawn = [t.train[0][torch.randperm(len(t.train[0]), generator=g)[: setting.calibration]] for t in setting.tasks]
    mixed = torch.cat(drawn)[torch.randperm(2 * setting.calibration, generator=g)]
    loader = list(mixed.split(125))
    prepared = fxzip.prepare(*models, example_inputs=loader[0][:2]).observe(loader, progress=False)
    for cut in setting.cuts:
        for refit in (False, True):
            for method in METHODS:
                zipped, ratio, seconds = timed_merge(prepared, cut=cut, method=method, refit=refit)
                found = [
                    scores(partial(zipped, task=key), task)
                    for key, task in zip(zipped.heads, setting.tasks, strict=True)
                ]
                yield _row(f"{method} + refit" if refit else method, cut, found, ratio, seconds)


def table(name: str, setting: Setting, rows: list[dict[str, Any]]) -> Table:
    """The rows, to print."""
    header = ("method", "cut", "FLOPs", *(task.name for task in setting.tasks), "average", "loss", "seconds")
    cells = []
    for row in rows:
        cost = "2.00" if row["flops"] is None else f"{row['flops']:.2f}"
        accuracy = [f"{found['accuracy']:.1f}" for found in row["tasks"]] + [f"{row['accuracy']:.1f}"]
        cut = "full" if row["cut"] is None else row["cut"]
        cells.append([row["method"], cut, cost, *accuracy, f"{row['loss']:.3f}", f"{row['seconds']:.1f}"])
    return printed(name, header, cells, left=(0, 1))


def main() -> None:
    """Train what is missing, merge, print and write."""
    line = CommandLine(__doc__).data("a folder with mnist.npz").numbers(threads=1).results("transformers")
    options = line.several("only", ("vit", "gpt")).read()
    known: dict[str, Any] = json.loads(options.json.read_text())["pairs"] if options.json.exists() else {}
    for name in options.only:
        setting = {"vit": vit, "gpt": gpt}[name](options.data)
        known[name] = list(measure(name, setting))
        Console().print(table(name, setting, known[name]))
        write(options.json, {**facts("transformers", options.threads), "pairs": known})


if __name__ == "__main__":
    main()

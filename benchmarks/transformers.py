"""Pairs of small transformers on disjoint tasks, merged in every way: does what merges convolutions merge attention?

    python -m benchmarks.transformers --data ../shared/data [--threads 1] [--only vit gpt]

``vit``, ``vit other``: two vision transformers on the MNIST digits 0-4 and 5-9 (28×28, patches of 7×7).
``gpt``: two language models of characters, one on English prose (the topics of Python's own help), the other on
Python code (its standard library, without comments and docstrings). Both texts come with every Python.
``gpt other``: the same on the library's docstrings, and on packages of it.

Nothing was tuned on the pairs that are called other. Each network is trained from its own seed, for some two minutes,
or read from benchmarks/checkpoints. The merges see unlabelled training inputs of both tasks. Writes
benchmarks/results/transformers.json, row by row, so that a run can be taken up again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Generator, Tensor
from torch.nn import functional as F

import fxzip
from benchmarks.lib.command import CommandLine
from benchmarks.lib.machine import facts
from benchmarks.lib.merges import timed_merge
from benchmarks.lib.runs import Kept, Row
from benchmarks.lib.small_transformers import Setting, Task, gpt, gpt_other, networks, vit
from benchmarks.lib.tables import printed

POLISH = 12
METHODS = ("average", "permute", "zip", "select", "pca")


@dataclass(frozen=True)
class Pair:
    """A pair of networks.

    Attributes:
        make: The tasks and how networks are trained on them.
        seed: Of the first network; the second one's is the next.
        checkpoints: What the checkpoints are called.
    """

    make: Callable[[Path], Setting]
    seed: int
    checkpoints: str


PAIRS = {
    "vit": Pair(vit, 0, "vit"),
    "vit other": Pair(vit, 2, "vit"),
    "gpt": Pair(gpt, 0, "gpt"),
    "gpt other": Pair(gpt_other, 2, "gpt_other"),
}


@dataclass(frozen=True)
class Merge:
    """One way to merge.

    Attributes:
        method: The matcher.
        fit: ``none``, ``refit`` or ``polish``.
        cut: Where the heads begin; None: full.
        width: As of `fxzip.zip`.
        images: Calibration images of each task; None: the setting's own.
    """

    method: str
    fit: str
    cut: str | None = None
    width: float | None = None
    images: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The options of `convert`."""
        refit = {"none": False, "refit": True, "polish": fxzip.RefitOptions(polish=POLISH)}[self.fit]
        return {"method": self.method, "cut": self.cut, "width": self.width, "refit": refit}


def merges(name: str, setting: Setting) -> Iterator[Merge]:
    """The ways in which a pair is merged."""
    for fit in ("none", "refit"):
        for method in METHODS:
            yield Merge(method, fit)
    yield Merge("select", "polish")
    yield Merge("pca", "polish")
    yield Merge("select", "refit", width=1.2)
    yield Merge("select", "polish", width=1.2)
    yield Merge("pca", "refit", width=1.2)
    for cut in setting.cuts[1:]:
        yield Merge("select", "refit", cut=cut)
    if name.endswith("other"):
        yield Merge("average", "polish")
        yield Merge("select", "refit", images=2_500)
        yield Merge("select", "polish", images=2_500)
        yield Merge("pca", "polish", images=2_500)
        yield Merge("pca", "polish", width=1.3, images=2_500)


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


def _row(pair: str, merge: Merge, images: int, found: list[dict[str, float]], **more: Any) -> Row:
    row: Row = {"pair": pair, "method": merge.method, "fit": merge.fit, "cut": merge.cut or "full"}
    row |= {"width": merge.width or 1.0, "images": images, "tasks": found, **more}
    return row | {key: sum(f[key] for f in found) / len(found) for key in ("accuracy", "loss")}


def measure(name: str, data: Path, kept: Kept) -> Iterator[Row]:
    """The rows of a pair that are not there yet: the networks alone, and one for each merge."""
    pair = PAIRS[name]
    setting, models = networks(pair.make, pair.seed, pair.checkpoints, data)
    alone = Merge("alone", "none")
    if (name, "alone", "none", "full", 1.0, 0) not in kept:
        found = [scores(model, task) for model, task in zip(models, setting.tasks, strict=True)]
        yield _row(name, alone, 0, found, flops=2.0, seconds=0.0)
    observed: dict[tuple[int, bool], fxzip.Prepared] = {}
    for merge in merges(name, setting):
        images = merge.images or setting.calibration
        if (name, merge.method, merge.fit, merge.cut or "full", merge.width or 1.0, images) in kept:
            continue
        key = images, merge.method == "pca"
        if key not in observed:
            loader = drawn(setting, images, pair.seed)
            prepared = fxzip.prepare(*models, example_inputs=loader[0][:2], linearise=key[1])
            observed[key] = prepared.observe(loader, progress=False)
        zipped, ratio, seconds = timed_merge(observed[key], **merge.options)
        heads = zip(zipped.heads, setting.tasks, strict=True)
        found = [scores(partial(zipped, task=key), task) for key, task in heads]
        fidelity = zipped.report.fidelity
        depths = {} if fidelity is None else {depth.name: depth.unexplained for depth in fidelity.depths}
        yield _row(name, merge, images, found, flops=ratio, seconds=seconds, unexplained=depths)


def drawn(setting: Setting, images: int, seed: int) -> list[Tensor]:
    """Batches of so many inputs of each task, in a random order."""
    g = Generator().manual_seed(seed)
    drawn = [t.train[0][torch.randperm(len(t.train[0]), generator=g)[:images]] for t in setting.tasks]
    return list(torch.cat(drawn)[torch.randperm(2 * images, generator=g)].split(125))


def lines(rows: list[Row]) -> Iterator[list[str]]:
    """The rows of one pair, for a table: how far behind the networks alone each is, too."""
    alone = next(row for row in rows if row["method"] == "alone")
    for row in rows:
        fit = {"none": "", "refit": " + refit", "polish": " + refit + polish"}[row["fit"]]
        behind = "" if row is alone else f"{alone['accuracy'] - row['accuracy']:.1f}"
        cells = [f"{row['method']}{fit}", row["cut"], f"{row['width']:g}", str(row["images"] or "")]
        cells += [f"{row['flops']:.2f}"]
        cells += [f"{found['accuracy']:.1f}" for found in row["tasks"]]
        yield [*cells, f"{row['accuracy']:.1f}", behind, f"{row['loss']:.3f}", f"{row['seconds']:.0f}"]


HEADER = (
    "method", "cut", "width", "images of each", "FLOPs", "first", "second", "average", "behind", "loss", "seconds",
)  # fmt: skip


def main() -> None:
    """Train what is missing, merge, print and write."""
    line = CommandLine(__doc__).data("a folder with mnist.npz").numbers(threads=1).results("transformers")
    options = line.several("only", PAIRS).read()
    keys = ("pair", "method", "fit", "cut", "width", "images")
    kept = Kept(options.json, facts("transformers", options.threads), keys)
    for name in options.only:
        kept.extend(measure(name, options.data, kept))
        rows = [row for row in kept.rows if row["pair"] == name]
        Console().print(printed(name, HEADER, list(lines(rows)), left=(0, 1)))


if __name__ == "__main__":
    main()

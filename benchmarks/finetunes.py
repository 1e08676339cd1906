"""Fine-tunes of one checkpoint, merged by fxzip and by what is mostly used for them.

    python -m benchmarks.finetunes --data ../shared/data --bases resnet8 --images 100 1000

Networks are trained first, or read from benchmarks/checkpoints (`benchmarks.lib.finetunes`). The merges see unlabelled
training images of both tasks, an equal share of each. Figures go to benchmarks/results/finetunes.json as they come.
Nothing is tuned on them.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import fxzip
from benchmarks.lib import baselines
from benchmarks.lib.command import CommandLine
from benchmarks.lib.finetunes import BASES, fine_tuned, tasks
from benchmarks.lib.machine import facts, timed
from benchmarks.lib.merges import METHODS, measured, percent, timed_merge
from benchmarks.lib.mixed import Answer, answers_of, outputs
from benchmarks.lib.runs import Kept, Row
from benchmarks.lib.tables import shown

PAIRS = {"halves": ("first", "second"), "half and MNIST": ("first", "mnist")}
CLASSIFIER = {"resnet8": "fc", "lite0": "classifier"}
OURS = ("average", "average + refit", "select + refit", "zip + refit", "default")
LINEAR = {"pca + refit": {"method": "pca"}}
"""For networks with linear spaces (bottlenecks without an activation), which are prepared for it."""


def weights_of(name: str, models: Sequence[nn.Module], base: nn.Module, images: Sequence[Tensor]) -> Any:
    """The merged weights of a baseline."""
    states = [model.state_dict() for model in models]
    # classifiers are each task's own, whatever a baseline makes of the checkpoint's
    start = {key: value for key, value in base.state_dict().items() if value.shape == states[1][key].shape}
    if name == "RegMean":
        return baselines.regmean(models, images)
    return {"task arithmetic": baselines.task_arithmetic, "TIES": baselines.ties}[name](states, start)


def measure(base: str, pair: str, images: int, data: Any, done: Kept) -> Iterator[Row]:
    """A row for each way to merge a pair that is not done."""
    found = tasks(BASES[base], data, PAIRS[pair])
    models = [fine_tuned(base, task, splits[0], data) for task, splits in found.items()]
    tests = [splits[1] for splits in found.values()]
    drawn = [splits[0].images[: images // 2] for splits in found.values()]
    mixed = list(torch.stack(drawn, 1).flatten(0, 1).split(50))

    def row(method: str, answers: Sequence[Answer], seconds: float) -> Row:
        scores = [
            percent(outputs(answer, test).argmax(1) == test.labels) for answer, test in zip(answers, tests, strict=True)
        ]
        key = {"base": base, "pair": pair, "images": images, "method": method}
        return {**key, "average": statistics.mean(scores), "scores": scores, "seconds": seconds}

    def wanted(method: str) -> bool:
        return (base, pair, images, method) not in done

    if wanted("ensemble"):
        yield row("ensemble", models, 0.0)
    torch.manual_seed(0)
    start = BASES[base].make(data, int(tests[0].labels.max()) + 1)
    for name in filter(wanted, ("task arithmetic", "TIES", "RegMean")):
        seconds, _, weights = timed(partial(weights_of, name, models, start, mixed))
        yield row(name, baselines.as_models(models, weights, mixed, CLASSIFIER[base]), seconds)
    for names, linear in ((OURS, False), (LINEAR if base == "lite0" else {}, True)):
        todo = list(filter(wanted, names))
        if not todo:
            continue
        prepared = fxzip.prepare(*models, example_inputs=mixed[0][:2], linearise=linear).observe(mixed, progress=False)
        for name in todo:
            zipped, _, seconds = timed_merge(prepared, **{**METHODS, **LINEAR}[name])
            yield row(name, answers_of(zipped), seconds) | measured(zipped)


def main() -> None:
    """Run what is missing, write it, print all."""
    line = (
        CommandLine(__doc__)
        .data("a folder with the packed data sets, or torchvision's")
        .several("bases", BASES)
        .several("pairs", PAIRS)
    )
    line.parser.add_argument("--images", type=int, nargs="+", default=[100, 1000])
    options = line.numbers(threads=1).results("finetunes").read()
    kept = Kept(options.json, facts("finetunes", options.threads, "fxzip"), ("base", "pair", "images", "method"))
    for base in options.bases:
        for pair in options.pairs:
            for images in options.images:
                kept.extend(measure(base, pair, images, options.data, kept))
    lines = [{k: round(v, 2) if isinstance(v, float) else v for k, v in r.items() if k != "scores"} for r in kept.rows]
    Console(width=160).print(shown(lines, "Fine-tunes of one checkpoint"))


if __name__ == "__main__":
    main()

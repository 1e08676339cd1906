"""ResNet-20 trained on different data sets, merged in pairs and all at once (the paper's Table 2, in small).

    python -m benchmarks.datasets --data ../shared/data

The data sets are CIFAR-10, MNIST in three channels, scikit-learn's digits, and letters that are drawn here in any
colours (`benchmarks.lib.data.load_letters`). A network for each is trained from its own seed, all for about the same
number of steps, or read from benchmarks/checkpoints. The merges see unlabelled training images, an equal share from
each data set. Each merge's figures go to benchmarks/results/datasets_SETTING.json as they come, so that a run can be
taken up again; the tables that the docs show go to benchmarks/results/datasets.json.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path

from rich.console import Console

from benchmarks.lib.command import CommandLine
from benchmarks.lib.data import Split, load_cifar10, load_digits, load_letters, load_mnist
from benchmarks.lib.merges import in_order, percent
from benchmarks.lib.mixed import Answer, Setting, Source, begin, learn, measure, outputs
from benchmarks.lib.models import resnet20
from benchmarks.lib.runs import RESULTS, Row, write
from benchmarks.lib.tables import shown
from benchmarks.lib.training import augment

SOURCES: dict[str, Callable[[Path, int], tuple[Split, Split]]] = {
    "CIFAR-10": load_cifar10,
    "MNIST": load_mnist,
    "digits": lambda _, size: load_digits(size),
    "letters": lambda _, size: load_letters(size),
}
CUTS = {"full": None, "to layer3": "layer3"}
NAMES = (
    "average", "permute", "ZipIt!", "average + refit", "permute + refit", "select + refit", "zip + refit", "default",
)  # fmt: skip


def sources(setting: Setting, data: Path) -> dict[str, Source]:
    """All data sets with their networks."""
    found = {}
    for seed, (name, load) in enumerate(SOURCES.items()):
        splits = load(data, setting.size)
        vary = augment if name == "CIFAR-10" else partial(augment, flip=False, border="replicate")
        make = partial(resnet20, setting.width, int(splits[0].labels.max()) + 1)
        found[name] = learn(name, make, splits, setting, benchmark="datasets", seed=seed, vary=vary)
    return found


def groups(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Every pair, and all at once."""
    return list(dict.fromkeys([*combinations(names, 2), tuple(names)]))


def accuracy(answer: Answer, split: Split) -> float:
    """In percent."""
    return percent(outputs(answer, split).argmax(1) == split.labels)


def pairs_table(rows: Sequence[Row]) -> list[Row]:
    """A line for each cut and method, a column for each pair with the accuracies on its two data sets."""
    lines = []
    for cut, method in dict.fromkeys((row["cut"], row["method"]) for row in rows):
        mine = [row for row in rows if (row["cut"], row["method"]) == (cut, method)]
        line: Row = {"cut": cut, "method": method}
        for row in mine:
            line[row["models"]] = " / ".join(f"{score:.1f}" for score in row["scores"].values())
        means = {key: statistics.mean(row[key] for row in mine) for key in ("average", "flops", "seconds")}
        lines.append(line | costs(means))
    return lines


def all_table(rows: Sequence[Row]) -> list[Row]:
    """A line for each cut and method, a column for each data set."""
    return [
        {"cut": row["cut"], "method": row["method"]}
        | {name: round(score, 1) for name, score in row["scores"].items()}
        | costs(row)
        for row in rows
    ]


def costs(row: Row) -> Row:
    """The last columns of both tables."""
    found = {"average": round(row["average"], 1), "FLOPs": round(row["flops"], 2)}
    return found | {"merge_s": round(row["seconds"], 1)}


def summary(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The tables of the docs, by their titles."""
    two = [row for row in rows if len(row["scores"]) == 2]
    more = [row for row in rows if len(row["scores"]) > 2]
    return {"Pairs": pairs_table(two), "All at once": all_table(more)}


def main() -> None:
    """Run what is missing, write it, print all."""
    line = CommandLine(__doc__).training()
    options = line.numbers(width=1, size=16, steps=1500, images=1000, test=2000, threads=1).read()
    setting, about, kept = begin("datasets", "ResNet-20", options)
    found = sources(setting, options.data)
    for names in groups(list(found)):
        chosen = {name: found[name] for name in names}
        kept.extend(measure(chosen, setting.images, CUTS, NAMES, accuracy, kept))
    tables = summary(in_order(kept.rows, CUTS, NAMES))
    write(RESULTS / "datasets.json", {**about, **tables})
    for title, lines in tables.items():
        Console(width=160).print(shown(lines, title))


if __name__ == "__main__":
    main()

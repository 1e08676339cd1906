"""ResNet-20 trained on different data sets, merged in pairs and all at once (the paper's Table 2, in small).

    python -m benchmarks.datasets --data ../shared/data

The data sets are CIFAR-10, MNIST in three channels, scikit-learn's digits, and letters that are drawn here in any
colours (`benchmarks.data.load_letters`). A network for each is trained from its own seed, all for the same number of
steps, or read from benchmarks/checkpoints. The merges see unlabelled training images, an equal share from each data
set. Each merge's figures go to benchmarks/results/datasets_SETTING.json as they come, so that a run can be taken up
again; the tables that the docs show go to benchmarks/results/datasets.json.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fxzip
from benchmarks.cifar import METHODS, percent
from benchmarks.data import Split, load_cifar10, load_digits, load_letters, load_mnist
from benchmarks.models import resnet20
from benchmarks.runs import CHECKPOINTS, RESULTS, Kept, Row, command_line, facts, shown, write
from benchmarks.training import augment, train

SOURCES: dict[str, Callable[[Path, int], tuple[Split, Split]]] = {
    "CIFAR-10": load_cifar10,
    "MNIST": load_mnist,
    "digits": lambda _, size: load_digits(size),
    "letters": lambda _, size: load_letters(size),
}
CUTS = {"full": None, "to layer3": "layer3"}
NAMES = (
    "average", "permute", "ZipIt!", "average + refit", "permute + refit", "select + refit", "zip + refit (default)",
)  # fmt: skip
BATCH = 128
SHARE = 25
"""Images of one data set in a batch of the calibration loaders: whatever reads a part reads of all."""


@dataclass(frozen=True)
class Setting:
    """What the rows depend on."""

    width: int
    size: int
    steps: int
    images: int
    test: int
    bf16: bool

    @property
    def trained(self) -> str:
        """What a checkpoint depends on, for its name."""
        return f"w{self.width}_s{self.size}_n{self.steps}{'_bf16' if self.bf16 else ''}"


@dataclass(frozen=True)
class Source:
    """A data set, and the network that was trained on it."""

    network: nn.Module
    train: Split
    test: Split


def sources(setting: Setting, data: Path) -> dict[str, Source]:
    """All data sets with their networks, which are trained where there is no checkpoint."""
    found = {}
    for seed, (name, load) in enumerate(SOURCES.items()):
        split, test = load(data, setting.size)
        checkpoint = CHECKPOINTS / f"datasets_{setting.trained}_{name}.pt"
        network = train(
            partial(resnet20, setting.width, int(split.labels.max()) + 1),
            split,
            seed=seed,
            epochs=max(1, round(setting.steps * BATCH / len(split.images))),
            batch=BATCH,
            bf16=setting.bf16,
            checkpoint=checkpoint,
            vary=augment if name == "CIFAR-10" else partial(augment, flip=False, border="replicate"),
            log=lambda text, name=name: print(f"{name}: {text}", flush=True),  # type: ignore[misc]
        )
        found[name] = Source(network, split, test.first(setting.test))
    return found


def groups(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Every pair, and all at once."""
    return list(dict.fromkeys([*combinations(names, 2), tuple(names)]))


def calibration(chosen: Mapping[str, Source], images: int) -> list[DataLoader[Tensor]]:
    """A loader for each data set, of an equal share of the images, drawn at random."""
    share = images // len(chosen)
    generator = torch.Generator().manual_seed(0)
    drawn = [s.train.images[torch.randperm(len(s.train.images), generator=generator)[:share]] for s in chosen.values()]
    return [DataLoader(part, batch_size=SHARE) for part in drawn]  # type: ignore[arg-type]


@torch.no_grad()
def accuracies(answer: Callable[[Tensor, int], Tensor], chosen: Mapping[str, Source]) -> list[float]:
    """The accuracy on each data set in percent, of a function of images and the number of their data set."""
    found = []
    for number, source in enumerate(chosen.values()):
        logits = torch.cat([answer(images, number) for images in source.test.images.split(1000)])
        found.append(percent(logits.argmax(1) == source.test.labels))
    return found


def row(chosen: Mapping[str, Source], cut: str, method: str, flops: float, seconds: float, scores: list[float]) -> Row:
    """One line of the raw results."""
    found: Row = {"models": " + ".join(chosen), "cut": cut, "method": method, "flops": flops, "seconds": seconds}
    return found | {"accuracies": dict(zip(chosen, scores, strict=True)), "average": statistics.mean(scores)}


def measure(chosen: Mapping[str, Source], images: int, done: Kept) -> Iterator[Row]:
    """A row for the networks by themselves, and for each cut and method that is not done."""
    group, networks = " + ".join(chosen), [source.network for source in chosen.values()]
    if (group, "none", "ensemble") not in done:
        scores = accuracies(lambda x, number: networks[number](x), chosen)
        yield row(chosen, "none", "ensemble", len(networks), 0.0, scores)
    wanted = [(cut, name) for cut in CUTS for name in NAMES if (group, cut, name) not in done]
    if not wanted:
        return
    start = time.perf_counter()
    prepared = fxzip.prepare(*networks, example_inputs=next(iter(chosen.values())).train.images[:2])
    prepared.observe(calibration(chosen, images), progress=False)
    observing = time.perf_counter() - start
    for cut, name in wanted:
        start = time.perf_counter()
        zipped = prepared.convert(cut=CUTS[cut], progress=False, **METHODS[name])
        seconds = time.perf_counter() - start + observing
        ratio = zipped.report.flops_after / zipped.report.before[0].flops
        scores = accuracies(lambda x, number, zipped=zipped: zipped(x, task=zipped.names[number]), chosen)
        yield row(chosen, cut, name, ratio, seconds, scores)


def by_method(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows by cut and method, as they came first."""
    found: dict[tuple[str, str], list[Row]] = {}
    for each in rows:
        found.setdefault((each["cut"], each["method"]), []).append(each)
    return found


def pairs_table(rows: Sequence[Row]) -> list[Row]:
    """A line for each cut and method, a column for each pair with the accuracies on its two data sets."""
    lines = []
    for (cut, method), mine in by_method(rows).items():
        line: Row = {"cut": cut, "method": method}
        for each in mine:
            line[each["models"]] = " / ".join(f"{score:.1f}" for score in each["accuracies"].values())
        line["average"] = round(statistics.mean(each["average"] for each in mine), 1)
        line["FLOPs"] = round(statistics.mean(each["flops"] for each in mine), 2)
        lines.append(line | {"merge_s": round(statistics.mean(each["seconds"] for each in mine))})
    return lines


def all_table(rows: Sequence[Row]) -> list[Row]:
    """A line for each cut and method, a column for each data set."""
    lines = []
    for each in rows:
        line: Row = {"cut": each["cut"], "method": each["method"]}
        line |= {name: round(score, 1) for name, score in each["accuracies"].items()}
        line |= {"average": round(each["average"], 1), "FLOPs": round(each["flops"], 2)}
        lines.append(line | {"merge_s": round(each["seconds"])})
    return lines


def summary(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The tables of the docs, by their titles."""
    two = [each for each in rows if len(each["accuracies"]) == 2]
    more = [each for each in rows if len(each["accuracies"]) > 2]
    found = {"Pairs: accuracy on each of the two data sets in %": pairs_table(two)}
    return found | ({"All at once": all_table(more)} if more else {})


def main() -> None:
    """Run what is missing, write it, print all."""
    options = command_line(__doc__, width=1, size=16, steps=1500, images=1000, test=2000).parse_args()
    torch.set_num_threads(options.threads)
    setting = Setting(options.width, options.size, options.steps, options.images, options.test, options.bf16)
    about = facts("datasets", options.threads)
    about["setting"] = f"ResNet-20 {setting.trained}, {setting.images} images, {setting.test} test images of each"
    path = RESULTS / f"datasets_{setting.trained}_i{setting.images}_t{setting.test}.json"
    kept = Kept(path, about, keys=("models", "cut", "method"))
    found = sources(setting, options.data)
    for names in groups(list(found)):
        kept.extend(measure({name: found[name] for name in names}, setting.images, kept))
    tables = summary(kept.rows)
    write(RESULTS / "datasets.json", {**about, **tables})
    for title, lines in tables.items():
        Console(width=160).print(shown(lines, title))


if __name__ == "__main__":
    main()

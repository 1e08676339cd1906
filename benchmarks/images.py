"""How many images a merge wants: pairs of ResNet-20 (`benchmarks.cifar`), merged up to the classifiers.

    python -m benchmarks.images --data ../shared/data --pairs 1 2 --images 500 2000 10000

``behind`` and ``joint behind`` are in points of accuracy: of the ensemble's average of both tasks, and of its choice
among all classes by the largest logit. Figures go to benchmarks/results/images.json as they come.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

from rich.console import Console

from benchmarks.cifar import ENSEMBLE, measure_pair
from benchmarks.lib.command import CommandLine
from benchmarks.lib.machine import facts
from benchmarks.lib.pairs import Setting
from benchmarks.lib.runs import RESULTS, Kept, Row
from benchmarks.lib.tables import shown

FULL = "19 of 20"
WAYS = ("ZipIt!", "permute + refit", "zip + refit", "select + refit", "default, fast", "default", "default, thorough")


def measure(setting: Setting, pair: int, options: Namespace, kept: Kept) -> Iterator[Row]:
    """A row for each way to merge that is missing."""
    wanted = [way for way in options.methods if (pair, options.images, way) not in kept]
    if not wanted:
        return
    found = measure_pair(setting, pair, options, [ENSEMBLE, *((FULL, way) for way in wanted)])
    best = next(found)
    for row in found:
        lost = {"behind": best["average"] - row["average"], "joint behind": best["joint"] - row["joint"]}
        shown = {key: row[key] for key in ("method", "average", "joint", "agreement", "by", "seconds") if key in row}
        yield {"pair": pair, "images": options.images, **shown, **lost}


def main() -> None:
    """Run what is missing, write it, print all."""
    line = CommandLine(__doc__).training().several("methods", WAYS, "ways to merge").pairs(3)
    line.parser.add_argument("--images", type=int, nargs="+", default=[500, 2_000, 10_000])
    options = line.numbers(width=2, size=16, epochs=7, threads=1).read()
    setting = Setting(options.width, options.size, options.epochs, options.bf16)
    kept = Kept(RESULTS / "images.json", facts("images", options.threads, "fxzip"), ("pair", "images", "method"))
    for images in options.images:
        for pair in options.pairs:
            kept.extend(measure(setting, pair, Namespace(**{**vars(options), "images": images}), kept))
    kept.rows.sort(key=lambda row: (row["pair"], row["images"], WAYS.index(row["method"])))
    Console(width=160).print(shown(kept.rows, f"ResNet-20 {setting.key}"))


if __name__ == "__main__":
    main()

"""Pairs of ResNet-20 merged at several widths, beside a cut and a start: accuracy over FLOPs.

    python -m benchmarks.widths --data ../shared/data --pairs 1 --images 2000

Networks are those of `benchmarks.cifar`. Each merge is by ``select`` with one round; its figures go to
benchmarks/results/widths.json as they come, so that a run can be taken up again. Pair 0 is the one that fxzip's options
were tuned on; it is left out unless it is named.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console

import fxzip
from benchmarks.lib.command import CommandLine
from benchmarks.lib.data import load_cifar10
from benchmarks.lib.machine import facts, timed
from benchmarks.lib.merges import timed_merge
from benchmarks.lib.pairs import Setting, accuracies, calibration, halves, models
from benchmarks.lib.runs import RESULTS, Kept, Row
from benchmarks.lib.tables import shown

WAYS: dict[str, dict[str, Any]] = {
    "one network's width": {},
    "width 1.15": {"width": 1.15},
    "flops<=1.33x": {"budget": "flops<=1.33x"},
    "width 1.3": {"width": 1.3},
    "flops<=1.0x": {"budget": "flops<=1.0x"},
    "cut at layer3": {"cut": "layer3"},
    "start at layer2": {"start": "layer2"},
    "width 0.8": {"width": 0.8},
}
"""What is merged how wide, by what tables call it."""
ENSEMBLE = "ensemble"


def measure(setting: Setting, pair: int, options: Any, wanted: list[str]) -> Iterator[Row]:
    """A row for each way that is wanted."""
    train, test = load_cifar10(options.data, options.size)
    networks, classes = models(setting, pair, train), halves(pair)
    loader = calibration(train, pair, options.images)
    if ENSEMBLE in wanted:
        found = accuracies(lambda x: tuple(network(x) for network in networks), test, classes)
        yield {"pair": pair, "images": options.images, "way": ENSEMBLE, "flops": 2.0, "seconds": 0.0, **found}
    prepared = fxzip.prepare(*networks, example_inputs=loader[0][:2])
    observing, _, _ = timed(lambda: prepared.observe(loader, progress=False))
    refit = fxzip.RefitOptions(rounds=options.rounds)
    for way in (each for each in wanted if each != ENSEMBLE):
        zipped, flops, seconds = timed_merge(prepared, method="select", refit=refit, **WAYS[way])
        row: Row = {"pair": pair, "images": options.images, "way": way, "flops": flops, "seconds": seconds + observing}
        fidelity = zipped.report.fidelity
        assert fidelity is not None
        yield row | accuracies(zipped, test, classes) | {"unexplained": fidelity.unexplained}


def main() -> None:
    """Run what is missing, write it, print all."""
    line = CommandLine(__doc__).training().several("ways", [ENSEMBLE, *WAYS], "how wide, and what is merged")
    line.parser.add_argument("--pairs", type=int, nargs="+", default=[1, 2], help="default: %(default)s")
    options = line.numbers(width=2, size=16, epochs=7, images=2_000, rounds=1).read()
    setting = Setting(options.width, options.size, options.epochs, options.bf16)
    about = facts("widths", 1, "fxzip") | {"setting": f"ResNet-20 {setting.key}, rounds {options.rounds}"}
    kept = Kept(RESULTS / "widths.json", about, keys=("pair", "images", "way"), same=("setting",))
    for pair in options.pairs:
        missing = [way for way in options.ways if (pair, options.images, way) not in kept]
        if missing:
            kept.extend(measure(setting, pair, options, missing))
    Console().print(shown(kept.rows, about["setting"]))


if __name__ == "__main__":
    main()

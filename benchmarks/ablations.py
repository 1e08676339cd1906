"""What each choice is worth, on the pair of CIFAR-10 halves that options are tuned on (pair 0 of benchmarks.cifar).

    python -m benchmarks.ablations --data ../shared/data

One thing is changed at a time, all else being ``method="zip"`` with one ridge for all layers: α and β of the matcher,
greedy against optimal assignment, the number of images, one merge point for each space or all, and rounds and ridge of
the refit. All merges are full zips; a merge that several tables need is made once. Figures go to
benchmarks/results/ablations_SETTING.json as they come, so that a run can be taken up again; the tables that the docs
show go to benchmarks/results/ablations.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby
from typing import Literal

from rich.console import Console
from torch import nn

import fxzip
from benchmarks.lib.command import CommandLine
from benchmarks.lib.data import Split, load_cifar10
from benchmarks.lib.machine import facts
from benchmarks.lib.merges import timed_merge
from benchmarks.lib.pairs import Setting, accuracies, calibration, halves, models
from benchmarks.lib.runs import RESULTS, Kept, Row, write
from benchmarks.lib.tables import shown
from fxzip.passes.refit import RefitOptions
from fxzip.views.style import matched

PAIR = 0
DIGITS = {"average": 1, "correlation": 3, "seconds": 0}
"""Of the figures that tables show, after the point."""


@dataclass(frozen=True)
class Merge:
    """A full zip; without further words by ``method="zip"`` and a ridge of 0.001.

    Attributes:
        images: How many images are observed; the refit reads at most `RefitOptions.images` of them.
        points: As of `fxzip.zip`, like the others.
        method: The matcher.
        alpha: Of the matcher ``zip``.
        beta: Of the matcher ``zip``.
        refit: Whether layers are refitted.
        ridge: Of the refit.
        rounds: Of the refit.
    """

    images: int = 1000
    points: Literal["last", "all"] = "last"
    method: str = "zip"
    alpha: float | None = 1.0
    beta: float | None = 1.0
    refit: bool = True
    ridge: float | None = 1e-3
    rounds: int | None = RefitOptions.rounds

    @property
    def plain(self) -> Merge:
        """The same without refit."""
        return replace(self, refit=False, ridge=None, rounds=None)


ENSEMBLE = Merge(0, "last", "ensemble", None, None, False, None, None)
"""No merge, for comparison."""
Figure = tuple[Merge, str]
"""A merge, and which of its figures to show."""
ALPHAS, BETAS = (0.0, 1e-4, 0.1, 0.5, 1.0), (0.0, 0.05, 0.5, 1.0)
IMAGES = (50, 100, 250, 1000, 4000, 10_000)
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
ROUNDS = (0, 1, 3, 5, 8)


def zipped_by(alpha: float, beta: float) -> Merge:
    """The matcher ``zip``. With β = 0 two models' merged channels never merge again, so any α is the same."""
    return Merge(alpha=alpha if beta else 1.0, beta=beta)


def assigned_by(method: str) -> Merge:
    """A matcher without options."""
    return Merge(method=method, alpha=None, beta=None)


def both(merge: Merge) -> dict[str, Figure]:
    """Columns without and with refit."""
    return {"without refit": (merge.plain, "average"), "with refit": (merge, "average")}


MATCHERS = {
    "one of each model, greedy (zip, β = 0)": zipped_by(1.0, 0.0),
    "one of each model, optimal (permute)": assigned_by("permute"),
    "any two, greedy (zip, α = 0, β = 1)": zipped_by(0.0, 1.0),
    "any two, optimal": assigned_by("optimal"),
    "any number, greedy (zip, the default)": Merge(),
    "ZipIt!'s choice (zip, α = 1e-4, β = 0.05)": zipped_by(1e-4, 0.05),
}
TABLES: dict[str, dict[str, dict[str, Figure]]] = {
    "α and β of zip, without refit": {
        f"α = {alpha:g}": {f"β = {beta:g}": (zipped_by(alpha, beta).plain, "average") for beta in BETAS}
        for alpha in ALPHAS
    },
    "Greedy and optimal matching": {
        name: {"mean correlation of what is merged": (merge.plain, "correlation"), **both(merge)}
        for name, merge in MATCHERS.items()
    }
    | {"ensemble": {"with refit": (ENSEMBLE, "average")}},
    "Number of images": {
        f"{images}": {**both(Merge(images=images)), "refit_s": (Merge(images=images), "seconds")} for images in IMAGES
    },
    "Merge points": {
        f"{name}, {points}": both(replace(merge, points=points))
        for name, merge in (("zip", Merge()), ("permute", assigned_by("permute")))
        for points in ("last", "all")
    },
    "Rounds of the refit": {
        f"{rounds}": {
            "with refit": (Merge(rounds=rounds), "average"),
            "refit_s": (Merge(rounds=rounds), "seconds"),
        }
        for rounds in ROUNDS
    },
    "Ridge of the refit": {f"{ridge:g}": {"with refit": (Merge(ridge=ridge), "average")} for ridge in RIDGES},
}
"""Tables of rows of columns."""


def merges(tables: Mapping[str, Mapping[str, Mapping[str, Figure]]]) -> list[Merge]:
    """What the tables need, each once, by what must be observed for it; quick ones first."""
    found = {merge for rows in tables.values() for line in rows.values() for merge, _ in line.values()}
    ordered = sorted(found, key=lambda m: (m.images, m.points, m.refit, m.method, m.alpha or 0, m.beta or 0))
    return sorted(ordered, key=lambda m: (m.images, m.points))


def measure(
    networks: Sequence[nn.Module], train: Split, test: Split, wanted: Sequence[Merge], done: Kept
) -> Iterator[Row]:
    """A row for each merge that is not done."""
    left = [merge for merge in wanted if tuple(asdict(merge).values()) not in done]
    prepared = fxzip.prepare(*networks, example_inputs=train.images[:2])
    for (images, points), group in groupby(left, key=lambda m: (m.images, m.points)):
        if images:
            prepared.observe(calibration(train, PAIR, images), points=points, progress=False)
        for each in group:
            if each == ENSEMBLE:
                yield {**asdict(each), **accuracies(lambda x: tuple(net(x) for net in networks), test, halves(PAIR))}
            else:
                yield {**asdict(each), **merged(prepared, each, test)}


def merged(prepared: fxzip.Prepared, wanted: Merge, test: Split) -> Row:
    """The figures of one merge; its seconds are without observing."""
    given = {name: getattr(wanted, name) for name in ("method", "alpha", "beta")}
    given["refit"] = RefitOptions(ridge=wanted.ridge, rounds=wanted.rounds) if wanted.refit else False
    zipped, _, seconds = timed_merge(prepared, **{name: value for name, value in given.items() if value is not None})
    correlation, _ = matched(zipped.report, [space.name for space in zipped.report.spaces])
    return {"seconds": seconds, "correlation": correlation, **accuracies(zipped, test, halves(PAIR))}


def summary(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The tables of the docs, by their titles; what was not measured is left out."""
    keys = [field.name for field in fields(Merge)]
    found = {tuple(row[key] for key in keys): row for row in rows}
    result: dict[str, list[Row]] = {}
    for title, table in TABLES.items():
        for name, columns in table.items():
            line: Row = {"changed": name}
            for column, (merge, figure) in columns.items():
                row = found.get(tuple(asdict(merge).values()))
                line[column] = None if row is None else round(row[figure], DIGITS[figure])
            result.setdefault(title, []).append(line)
    return result


def main() -> None:
    """Run what is missing, write it, print all."""
    options = CommandLine(__doc__).training().numbers(width=2, size=16, epochs=7, test=10000, threads=1).read()
    setting = Setting(options.width, options.size, options.epochs, options.bf16)
    about = facts("ablations", options.threads, "fxzip")
    about["setting"] = f"ResNet-20 {setting.key}, pair {PAIR}, {options.test} test images"
    keys = [field.name for field in fields(Merge)]
    kept = Kept(RESULTS / f"ablations_{setting.key}_t{options.test}.json", about, keys)
    train, test = load_cifar10(options.data, options.size)
    networks = models(setting, PAIR, train)
    kept.extend(measure(networks, train, test.first(options.test), merges(TABLES), kept))
    tables = summary(kept.rows)
    write(RESULTS / "ablations.json", {**about, **tables})
    for title, lines in tables.items():
        Console(width=120).print(shown(lines, title))


if __name__ == "__main__":
    main()

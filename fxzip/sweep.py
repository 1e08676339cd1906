"""`Sweep`: accuracy over FLOPs, of many merges from one pass of observing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxzip.checks import check_merge
from fxzip.data.loops import counted
from fxzip.errors import OptionError
from fxzip.passes.cut import Cut

if TYPE_CHECKING:
    from fxzip.merged import ZippedModel
    from fxzip.prepared import Prepared
    from fxzip.report import Report


@dataclass(frozen=True)
class SweepRow:
    """One merge.

    Attributes:
        method: The matcher.
        cut: Where the heads begin.
        flops: FLOPs of trunk and heads, in multiples of the mean network's.
        params: Parameters likewise.
        scores: What ``evaluate`` gave, by name.
    """

    method: str
    cut: str
    flops: float
    params: float
    scores: dict[str, float]


@dataclass(frozen=True)
class Sweep:
    """The merges of a sweep, in the order in which they were made. Printed it is a table."""

    rows: tuple[SweepRow, ...]

    def best(self, flops: float, score: str | None = None) -> SweepRow:
        """The row with the greatest score among those that cost at most ``flops``.

        Args:
            flops: In multiples of the mean network's.
            score: Which of the scores; None: the first.

        Raises:
            OptionError: No row is that cheap; the cheapest is named.
        """
        allowed = [row for row in self.rows if row.flops <= flops]
        if not allowed:
            cheapest = min(row.flops for row in self.rows)
            raise OptionError(f"no merge of the sweep costs at most {flops:g}x; the cheapest costs {cheapest:.3f}x")
        return max(allowed, key=lambda row: row.scores[score or next(iter(row.scores))])

    def to_json(self, path: str | PathLike[str]) -> None:
        """Write the rows."""
        Path(path).write_text(json.dumps({"rows": [asdict(row) for row in self.rows]}, indent=1) + "\n")

    def plot(self, path: str | PathLike[str], score: str | None = None) -> None:
        """Draw a score over FLOPs, a line for each method, to a file of any type that matplotlib writes.

        Raises:
            OptionError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise OptionError("Sweep.plot needs matplotlib: pip install fxzip[report]") from error
        name = score or next(iter(self.rows[0].scores))
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for method in dict.fromkeys(row.method for row in self.rows):
            points = sorted((row.flops, row.scores[name]) for row in self.rows if row.method == method)
            axes.plot(*zip(*points, strict=True), marker="o", label=method)
        axes.set_xlabel("FLOPs (networks)")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path)

    def __str__(self) -> str:
        from fxzip.report import new_table, render

        names = list(self.rows[0].scores) if self.rows else []
        shown = new_table("", "method", "cut", "FLOPs", "parameters", *names)
        for row in self.rows:
            scores = (f"{row.scores[name]:.2f}" for name in names)
            shown.add_row(row.method, row.cut, f"{row.flops:.2f}x", f"{row.params:.2f}x", *scores)
        return render(shown)


def run_sweep(
    prepared: Prepared, cuts: Sequence[Cut], methods: Iterable[str | Mapping[str, Any]],
    evaluate: Callable[[ZippedModel], float | Mapping[str, float]], progress: bool,
) -> Sweep:  # fmt: skip
    """Merge at every cut and in every way; all of them are checked before the first one.

    Args:
        prepared: The networks.
        cuts: As for `fxzip.zip`.
        methods: As for `Prepared.sweep`.
        evaluate: As for `Prepared.sweep`.
        progress: Show a bar.
    """
    ways = [{"method": way} if isinstance(way, str) else dict(way) for way in methods]
    names = [str(way.pop("name", way.get("method", "zip"))) for way in ways]
    for way in ways:
        if "cut" in way:
            raise OptionError(f"cut={way['cut']!r}: give sweep its cuts apart from the methods, as cuts=[...]")
        check_merge(type(prepared).convert, len(prepared.names), **way)
    for cut in cuts:
        prepared.place(cut)
    rows = []
    with counted(len(cuts) * len(ways), progress, "merging") as done:
        for name, way in zip(names, ways, strict=True):
            for cut in cuts:
                zipped = prepared.convert(**{"progress": False, **way}, cut=cut)
                rows.append(_as_row(name, zipped.report, evaluate(zipped)))
                done()
    return Sweep(tuple(rows))


def faithfulness(zipped: ZippedModel) -> dict[str, float]:
    """What a sweep looks at where nobody evaluates: agreement, where outputs have classes, and the explained share."""
    found = zipped.report.fidelity
    if found is None:
        return {"explained": 0.0}
    scores = {} if found.agreement is None else {"agreement": 100 * found.agreement}
    return {**scores, "explained": 100 * (1 - found.unexplained)}


def _as_row(name: str, report: Report, value: float | Mapping[str, float]) -> SweepRow:
    """The row of one merge, from what ``evaluate`` gave."""
    scores = {k: float(v) for k, v in value.items()} if isinstance(value, Mapping) else {"score": float(value)}
    one = len(report.before)
    flops = one * report.flops_after / max(report.flops_before, 1)
    return SweepRow(name, report.cut, flops, one * report.params_after / max(report.params_before, 1), scores)

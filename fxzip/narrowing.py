"""A report of some of the tasks of a merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from fxzip.fidelity import Fidelity
from fxzip.report import LayerRow, Report

Kind = TypeVar("Kind")


def narrowed(report: Report, names: Sequence[str]) -> Report:
    """The report of a merged network that has only these of its heads.

    Args:
        report: The report of all.
        names: The tasks that are left; what the report does not know is left out.
    """
    places = [report.names.index(name) for name in names if name in report.names]
    if tuple(report.names[place] for place in places) == report.names:
        return report

    def some(values: tuple[Kind, ...]) -> tuple[Kind, ...]:
        return tuple(values[place] for place in places) if len(values) == len(report.names) else values

    return replace(
        report,
        names=some(report.names),
        traced_by=some(report.traced_by),
        before=some(report.before),
        heads=some(report.heads),
        layers=_rows(report.layers, {"", *names}),
        fidelity=None if report.fidelity is None else _fidelity(report.fidelity, names, places),
    )


def _fidelity(fidelity: Fidelity, names: Sequence[str], places: Sequence[int]) -> Fidelity:
    answers = tuple(answer for name in names for answer in fidelity.of(name))
    depths = tuple(
        replace(depth, unexplained=tuple(depth.unexplained[place] for place in places)) for depth in fidelity.depths
    )
    return replace(fidelity, answers=answers, depths=depths)


def _rows(rows: tuple[LayerRow, ...], parts: set[str]) -> tuple[LayerRow, ...]:
    """The rows of some parts, their inputs counted anew."""
    kept = [number for number, row in enumerate(rows) if row.part in parts]
    place = {number: i for i, number in enumerate(kept)}
    return tuple(replace(rows[n], inputs=tuple(place[i] for i in rows[n].inputs if i in place)) for n in kept)

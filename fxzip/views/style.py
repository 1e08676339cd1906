"""How channel spaces, shapes and numbers look in drawings and on the report's page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fxzip.report import Report
from fxzip.views.outline import Block


@dataclass(frozen=True)
class Colour:
    """A tint to write on, with a contrast to `INK` of 12 or more, and a stroke, with one to white of 4.5 or more."""

    tint: str
    stroke: str


INK = "#1b1f24"
PLAIN = Colour("#f3f4f6", "#6b7280")
PALETTE = (
    Colour("#dbe8f6", "#2563a8"),
    Colour("#fbe3cd", "#a85208"),
    Colour("#d8efdc", "#23733a"),
    Colour("#f8dcd8", "#b23327"),
    Colour("#e8def5", "#6d3fb0"),
    Colour("#d3eef0", "#0d6f79"),
    Colour("#f8dcec", "#a72e74"),
    Colour("#ecebcb", "#66620c"),
    Colour("#eee0d6", "#7d4f32"),
)


def colours(report: Report, blocks: Sequence[Block]) -> dict[str, Colour]:
    """A colour for each channel space; those between blocks come first, so that neighbours differ."""
    between = [name for block in blocks for name in block.spaces]
    names = dict.fromkeys((*between, *(row.name for row in report.spaces)))
    return {name: PALETTE[number % len(PALETTE)] for number, name in enumerate(names)}


def colour_of(block: Block, found: dict[str, Colour]) -> Colour:
    """The colour of the space that a block's result lies in."""
    return found[block.spaces[0]] if block.spaces else PLAIN


def matched(report: Report, names: Iterable[str]) -> tuple[float | None, float | None]:
    """Mean correlation, and share of matches within one model, over the channels of some spaces.

    None where there are no such spaces, or none that was observed.
    """
    rows = [row for row in report.spaces if row.name in set(names) and row.size > 1]
    seen = [
        (row.correlation, row.size)
        for row in rows
        if row.correlation is not None and row.correlation == row.correlation
    ]
    size = sum(row.size for row in rows)
    within = sum(row.within * row.size for row in rows) / size if size else None
    total = sum(weight for _, weight in seen)
    return (sum(value * weight for value, weight in seen) / total if total else None), within


def merged_as(within: float | None) -> str:
    """In words, whether channels were merged across the models or within one."""
    if within is None:
        return "not matched"
    return "across" if within == 0 else f"{within:.1%} within"


def shape_text(shape: Sequence[int]) -> str:
    """``64 × 56 × 56``, ``512 values``."""
    return f"{shape[0]} values" if len(shape) == 1 else " × ".join(map(str, shape))


def quantity(value: float) -> str:
    """A number of parameters or operations in three digits: ``1.82 G``."""
    for scale, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= scale * 0.9995:
            digits = max(0, 2 - int(math.log10(abs(value) / scale * 1.0005)))
            return f"{value / scale:.{digits}f}{unit}"
    return f"{value:.0f}"


def flops_text(value: float) -> str:
    """``1.82 GFLOPs``."""
    text = quantity(value)
    return f"{text}FLOPs" if text[-1].isalpha() else f"{text} FLOPs"

"""What the page says about a report, in words and numbers that are ready to be shown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fxzip.report import LayerRow, Report
from fxzip.views.outline import Block, blocks
from fxzip.views.style import Colour, colour_of, colours, flops_text, matched, merged_as, quantity, shape_text


@dataclass(frozen=True)
class Box:
    """A block of the merged graph.

    Attributes:
        title: Its module.
        lines: What is said of it.
        colour: Of the space of its result.
        space: Name of that space; empty if there is none.
        share: Its share of the largest block's operations, 0 to 1.
        within: Share of matches within one model; None where nothing was matched.
        takes: Titles of the boxes it takes its inputs from, where that is not just the one before it.
    """

    title: str
    lines: tuple[str, ...]
    colour: Colour
    space: str
    share: float
    within: float | None
    takes: tuple[str, ...]


@dataclass(frozen=True)
class Tile:
    """A number at the top of the page."""

    value: str
    name: str
    note: str


@dataclass(frozen=True)
class Facts:
    """What the page shows.

    Attributes:
        blocks: The blocks of the merged graph.
        tiles: The numbers at the top.
        trunk: The boxes of the trunk.
        heads: The boxes of each head, by task.
        colours: The colour of each channel space.
        legend: The spaces that colour a box.
        spaces: Rows of the table of spaces.
        layers: Rows of the table of layers.
        notes: Further remarks.
    """

    blocks: tuple[Block, ...]
    tiles: tuple[Tile, ...]
    trunk: tuple[Box, ...]
    heads: dict[str, tuple[Box, ...]]
    colours: dict[str, Colour]
    legend: tuple[str, ...]
    spaces: tuple[tuple[str, ...], ...]
    layers: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, report: Report) -> Facts:
        """Of a report."""
        found = blocks(report.layers)
        shades = colours(report, found)
        boxes = [_box(report, found, place, shades) for place in range(len(found))]
        parts = {
            part: tuple(box for box, block in zip(boxes, found, strict=True) if block.part == part)
            for part in ("", *report.names)
        }
        return cls(
            blocks=found,
            tiles=tuple(_tiles(report)),
            trunk=parts.pop(""),
            heads=parts,
            colours=shades,
            legend=tuple(dict.fromkeys(name for block in found for name in block.spaces[:1])),
            spaces=tuple(_space_rows(report)),
            layers=tuple(_layer_row(report, row) for row in report.layers if row.layer),
            notes=tuple(_notes(report)),
        )


def _box(report: Report, found: tuple[Block, ...], place: int, shades: dict[str, Colour]) -> Box:
    block = found[place]
    most = max((other.flops for other in found), default=0) or 1
    correlation, within = matched(report, block.inner)
    lines = [shape_text(block.shape)]
    if block.flops:
        lines.append(flops_text(block.flops))
    if block.params:
        lines.append(f"{quantity(block.params)} parameters")
    if within is not None and any(row.layer for row in block.rows):
        lines.append(merged_as(within) + ("" if correlation is None else f", correlation {correlation:.2f}"))
    before = (place - 1,) if place and found[place - 1].part == block.part else _trunk_end(found)
    takes = () if block.inputs in (before, ()) else tuple(found[i].name for i in block.inputs)
    space = block.spaces[0] if block.spaces else ""
    title = f"output {block.part}" if block.kind == "output" else block.name
    return Box(
        title, tuple(line for line in lines if line), colour_of(block, shades), space, block.flops / most, within, takes
    )


def _trunk_end(found: tuple[Block, ...]) -> tuple[int, ...]:
    return tuple(i for i, block in enumerate(found) if not block.part)[-1:]


def _tiles(report: Report) -> Iterator[Tile]:
    count = len(report.names)
    for name, before, after in (
        ("operations", report.flops_before, report.flops_after),
        ("parameters", report.params_before, report.params_after),
    ):
        ratio = f"{100 * after / before:.0f}%" if before else "-"
        yield Tile(ratio, name, f"{quantity(after)} of the {quantity(before)} that the {count} models have")
    spaces = [row.name for row in report.spaces]
    correlation, within = matched(report, spaces)
    if correlation is not None:
        yield Tile(f"{correlation:.2f}", "mean correlation", f"of the matched channels, in {len(spaces)} spaces")
    if within is not None:
        yield Tile(f"{100 * within:.1f}%", "merged within a model", "the other matches are across the models")
    fidelity = report.fidelity
    if fidelity is not None and fidelity.agreement is not None:
        note = f"with the models' own answers, on {fidelity.images:,} images that the fit did not see"
        yield Tile(f"{100 * fidelity.agreement:.1f}%", "agreement", note)
    elif fidelity is not None:
        note = f"of the models' outputs, on {fidelity.images:,} images that the fit did not see"
        yield Tile(f"{100 * fidelity.unexplained:.1f}%", "unexplained", note)
    yield Tile(f"{100 * report.coverage:.1f}%", "coverage", "of a model's weights lie in a channel space")


def _space_rows(report: Report) -> Iterator[tuple[str, ...]]:
    for row in report.spaces:
        correlation = "-" if row.correlation is None or row.correlation != row.correlation else f"{row.correlation:.3f}"
        yield row.name, f"{row.size:,}", f"{row.sites:,}", correlation, f"{100 * row.within:.1f}%"


def _layer_row(report: Report, row: LayerRow) -> tuple[str, ...]:
    correlation, within = matched(report, row.spaces)
    merged = "own weights" if row.part else merged_as(within)
    shown = "-" if row.part or correlation is None else f"{correlation:.3f}"
    return row.name, row.kind, row.part or "trunk", merged, shown, quantity(row.flops), quantity(row.params)


def _notes(report: Report) -> Iterator[str]:
    if report.parting:
        yield f"The models diverge: {report.parting}"
    for answer in report.fidelity.answers if report.fidelity else ():
        yield f"Fidelity of {answer.task}{answer.output}: {answer.shown}"
    for each in report.tried:
        yield f"Method chosen from: {each}"
    if report.refitted:
        yield f"Layers whose weights were solved for (refit): {report.refitted}"
    if report.recalibrated:
        yield f"BatchNorm layers whose statistics were reset: {report.recalibrated}"
    yield f"Traced by: {', '.join(dict.fromkeys(report.traced_by))}"
    for name in report.frozen:
        yield f"Kept in place: {name}"

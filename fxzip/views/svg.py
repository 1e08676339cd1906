"""A merged network as SVG without Graphviz: the trunk above, the heads side by side below it, in rows by depth."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from xml.sax.saxutils import escape

from fxzip.views.outline import Block
from fxzip.views.style import INK, PLAIN, Colour

FONT = "Helvetica,Arial,sans-serif"
_LINE, _CHARACTER, _PAD = 14.0, 6.4, 10.0
"""Height of a line of text, the width of a character at 11 pixels, and the space around text in its box."""
_GAP, _FRAME, _LANE = 22.0, 14.0, 14.0
"""The space between boxes, around those of a part, and between lines that pass boxes by."""
_INVALID = re.compile("[^\\x20-\\ud7ff\\ue000-\\ufffd]")


@dataclass(frozen=True)
class Box:
    """A block with its text, and where it stands: the middle of its top, its width and height."""

    lines: tuple[str, ...]
    colour: Colour
    width: float
    height: float
    x: float = 0.0
    y: float = 0.0

    @property
    def bottom(self) -> float:
        """Where it ends."""
        return self.y + self.height


@dataclass(frozen=True)
class Frame:
    """The trunk or a head: its title, its members, and the rectangle around them."""

    title: str
    members: tuple[int, ...]
    x: float
    y: float
    width: float
    height: float


def svg(
    blocks: Sequence[Block], parts: Iterable[tuple[str, Sequence[int]]], text: Callable[[Block], Iterable[str]],
    colour: Callable[[Block], Colour],
) -> str:  # fmt: skip
    """The drawing.

    Args:
        blocks: The boxes, each after those that it takes the results of.
        parts: Titles and members of the trunk, which comes first, and of each head.
        text: The lines in a block's box.
        colour: A block's colour.
    """
    boxes = [_box(tuple(text(block)), colour(block)) for block in blocks]
    frames: list[Frame] = []
    left, top = _GAP, _GAP
    for title, members in parts:
        frame = _placed(boxes, blocks, title, members, left, top)
        if frames:
            left = frame.x + frame.width + _GAP
        else:
            top = frame.y + frame.height + 2 * _GAP  # the heads stand below the trunk
        frames.append(frame)
    width = max(frame.x + frame.width for frame in frames) + _GAP
    height = max(frame.y + frame.height for frame in frames) + _GAP
    frames[0] = _moved(boxes, frames[0], (width - frames[0].width) / 2 - frames[0].x)
    drawn = [*map(_frame, frames), *_edges(blocks, boxes, frames), *map(_shape, boxes)]
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    arrow = (
        f'<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 8 4 0 8z" fill="{PLAIN.stroke}"/></marker></defs>'
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{FONT}" font-size="11" fill="{INK}">'
    return "\n".join(
        [head, f'<rect width="{width:.0f}" height="{height:.0f}" fill="#fff"/>', arrow, *drawn, "</svg>\n"]
    )


def _box(lines: tuple[str, ...], colour: Colour) -> Box:
    width = max(map(len, lines), default=0) * _CHARACTER + 2 * _PAD
    return Box(lines, colour, width, len(lines) * _LINE + _PAD)


def _placed(
    boxes: list[Box], blocks: Sequence[Block], title: str, members: Sequence[int], left: float, top: float
) -> Frame:
    """Place a part's boxes in rows by their depth in it, each row in the order of what it takes."""
    depth: dict[int, int] = {}
    for i in members:
        depth[i] = 1 + max((depth[source] for source in blocks[i].inputs if source in depth), default=-1)
    rows = [[i for i in members if depth[i] == level] for level in range(1 + max(depth.values(), default=-1))]
    wide = max((sum(boxes[i].width for i in row) + _GAP * (len(row) - 1) for row in rows), default=0.0)
    wide = max(wide, len(title) * _CHARACTER)
    lanes = _LANE * len(_passing(blocks, depth))
    y = top + _LINE + _FRAME
    for row in rows:
        row.sort(key=lambda i: _mean([boxes[source].x for source in blocks[i].inputs if source in depth]))
        x = left + _FRAME + (wide - sum(boxes[i].width for i in row) - _GAP * (len(row) - 1)) / 2
        for i in row:
            boxes[i] = replace(boxes[i], x=x + boxes[i].width / 2, y=y)
            x += boxes[i].width + _GAP
        y = max(boxes[i].bottom for i in row) + _GAP
    return Frame(title, tuple(members), left, top, wide + 2 * _FRAME + lanes, y - _GAP + _FRAME - top)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _passing(blocks: Sequence[Block], depth: dict[int, int]) -> list[tuple[int, int]]:
    """The lines within a part that pass rows by, the short ones first."""
    found = [
        (source, i) for i in depth for source in blocks[i].inputs if source in depth and depth[i] - depth[source] > 1
    ]
    return sorted(found, key=lambda pair: depth[pair[1]] - depth[pair[0]])


def _moved(boxes: list[Box], frame: Frame, by: float) -> Frame:
    for i in frame.members:
        boxes[i] = replace(boxes[i], x=boxes[i].x + by)
    return replace(frame, x=frame.x + by)


def _edges(blocks: Sequence[Block], boxes: Sequence[Box], frames: Sequence[Frame]) -> list[str]:
    """The lines: down to the next row, around the right of what they pass, and from the trunk to the heads."""
    home = {i: frame for frame in frames for i in frame.members}
    drawn = []
    for frame in frames:
        tops = sorted({boxes[i].y for i in frame.members})
        passed = _passing(blocks, {i: tops.index(boxes[i].y) for i in frame.members})
        lane = {pair: frame.x + frame.width - _FRAME - _LANE * (len(passed) - 1 - n) for n, pair in enumerate(passed)}
        for i in frame.members:
            for source in blocks[i].inputs:
                if (source, i) in lane:
                    drawn.append(_around(boxes[source], boxes[i], lane[source, i], boxes[i].y - _GAP / 2))
                elif home[source] is not frame and boxes[source].y < max(boxes[j].y for j in home[source].members):
                    side = home[source].x + home[source].width - _FRAME / 2
                    drawn.append(_around(boxes[source], boxes[i], side, frame.y - _GAP))
                else:
                    drawn.append(_down(boxes[source], boxes[i]))
    return drawn


def _down(source: Box, target: Box) -> str:
    half = (target.y - source.bottom) / 2
    curve = f"C{source.x:.1f} {source.bottom + half:.1f} {target.x:.1f} {target.y - half:.1f}"
    return _line(f"M{source.x:.1f} {source.bottom:.1f}{curve} {target.x:.1f} {target.y:.1f}")


def _around(source: Box, target: Box, lane: float, into: float) -> str:
    """From a box's right side down a lane to a height, and from there into the top of another."""
    out, end = source.y + source.height / 2, target.x + min(12.0, target.width / 4)
    turn = 8.0 if end < lane else -8.0
    start = f"M{source.x + source.width / 2:.1f} {out:.1f}H{lane - 8:.1f}"
    down = f"Q{lane:.1f} {out:.1f} {lane:.1f} {out + 8:.1f}V{into - 8:.1f}"
    back = f"Q{lane:.1f} {into:.1f} {lane - turn:.1f} {into:.1f}H{end + turn:.1f}"
    return _line(f"{start}{down}{back}Q{end:.1f} {into:.1f} {end:.1f} {into + 8:.1f}V{target.y:.1f}")


def _line(path: str) -> str:
    return f'<path d="{path}" fill="none" stroke="{PLAIN.stroke}" marker-end="url(#arrow)"/>'


def _frame(frame: Frame) -> str:
    rectangle = f'x="{frame.x:.1f}" y="{frame.y:.1f}" width="{frame.width:.1f}" height="{frame.height:.1f}"'
    title = f'<text x="{frame.x + 8:.1f}" y="{frame.y + 15:.1f}" font-size="12">{_text(frame.title)}</text>'
    return f'<g class="cluster"><rect {rectangle} rx="8" fill="none" stroke="{PLAIN.stroke}"/>{title}</g>'


def _shape(box: Box) -> str:
    rectangle = f'x="{box.x - box.width / 2:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}"'
    first = box.y + _PAD / 2 + 0.75 * _LINE
    lines = [
        f'<text x="{box.x:.1f}" y="{first + _LINE * n:.1f}" text-anchor="middle">{_text(line)}</text>'
        for n, line in enumerate(box.lines)
    ]
    shape = f'<rect {rectangle} rx="6" fill="{box.colour.tint}" stroke="{box.colour.stroke}"/>'
    return f'<g class="node">{shape}{"".join(lines)}</g>'


def _text(value: str) -> str:
    return escape(_INVALID.sub("\ufffd", value))

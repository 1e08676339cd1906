"""Draw: a merged network as a picture of its modules, by Graphviz or without it, or as Mermaid text."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxzip.errors import OptionError, SaveError
from fxzip.folders import write_file
from fxzip.report import Report
from fxzip.views.drawable import PICTURES, TEXTS, graphviz_lacks, lacking
from fxzip.views.outline import Block, blocks
from fxzip.views.style import INK, PLAIN, Colour, colour_of, colours, flops_text, matched, merged_as, shape_text
from fxzip.views.svg import FONT, svg

if TYPE_CHECKING:
    from os import PathLike

    from fxzip.merged import ZippedModel


def draw(zipped: ZippedModel | Report, path: str | PathLike[str]) -> Path:
    """Draw the trunk and the heads, a box for each module, in the colours of their channel spaces.

        zipped.draw("merged.svg")

    Args:
        zipped: The network, or its report.
        path: The suffix says what is written: ``.svg``, by Graphviz where it is installed; ``.png`` or ``.pdf`` by
            Graphviz; ``.dot`` its source; ``.mmd`` Mermaid text, which GitHub and most editors show as a picture.

    Returns:
        The file. Without Graphviz or pydot a ``.png`` or ``.pdf`` becomes Mermaid text beside it, with a warning.

    Raises:
        OptionError: The suffix is another, or the network was saved by an fxzip that wrote no outline.
        SaveError: Nothing can be written there, or Graphviz fails.
    """
    report = zipped if isinstance(zipped, Report) else zipped.report
    target = Path(path)
    kind = target.suffix.lower()
    if kind not in PICTURES + TEXTS:
        raise OptionError(f"{target} cannot be drawn: its name must end in {', '.join(PICTURES + TEXTS)}")
    if not report.layers:
        raise OptionError("the report has no outline of the network (an older fxzip saved it): merge the models again")
    lack = lacking(kind)
    if kind in PICTURES and lack is not None:
        target = target.with_suffix(".mmd")
        warnings.warn(f"{target} is written, as Mermaid text: {lack}", stacklevel=3)
        kind = ".mmd"
    if kind in (".mmd", ".mermaid"):
        return write_file(target, mermaid(report).encode())
    if kind == ".svg" and graphviz_lacks() is not None:
        return write_file(target, _svg(report).encode())
    if lack is not None:
        raise OptionError(f"{target} cannot be drawn: {lack}; a name in .mmd gives Mermaid text")
    graph = _graphviz(report)
    if kind in PICTURES:
        return write_file(target, _run(graph, kind[1:]))
    return write_file(target, graph.to_string().encode())


def label(report: Report, block: Block) -> Iterator[str]:
    """The lines of text in a block's box."""
    if block.kind == "output":
        yield block.part
        return
    yield block.name
    sizes = (shape_text(block.shape), flops_text(block.flops) if block.flops else "")
    yield " · ".join(filter(None, sizes))
    correlation, within = matched(report, block.inner)
    if not block.part and within is not None and any(row.layer for row in block.rows):
        yield merged_as(within) + ("" if correlation is None else f", correlation {correlation:.2f}")


def _parts(report: Report, found: tuple[Block, ...]) -> Iterator[tuple[str, list[int]]]:
    """The trunk and each head, with the places of their blocks."""
    for part in ("", *report.names):
        yield (f"head: {part}" if part else "trunk"), [i for i, block in enumerate(found) if block.part == part]


# ---- Mermaid


def mermaid(report: Report) -> str:
    """A flowchart in Mermaid's language (https://mermaid.js.org/syntax/flowchart.html)."""
    found = blocks(report.layers)
    shades = colours(report, found)
    lines = ["flowchart TD"]
    for number, (title, members) in enumerate(_parts(report, found)):
        lines.append(f'  subgraph part{number}["{_escaped(title)}"]')
        for i in members:
            text = "<br/>".join(map(_escaped, label(report, found[i])))
            lines.append(f'    n{i}(["{text}"])' if found[i].kind in ("input", "output") else f'    n{i}["{text}"]')
        lines.append("  end")
    lines += [f"  n{source} --> n{i}" for i, block in enumerate(found) for source in block.inputs]
    painted: dict[Colour, list[str]] = {}
    for i, block in enumerate(found):
        painted.setdefault(colour_of(block, shades), []).append(f"n{i}")
    for number, (colour, nodes) in enumerate(painted.items()):
        lines.append(f"  classDef c{number} fill:{colour.tint},stroke:{colour.stroke},color:{INK}")
        lines.append(f"  class {','.join(nodes)} c{number}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    """Text for a Mermaid label in quotes: what has a meaning there goes as an entity."""
    return "".join(c if c.isalnum() or c in " .,:·×%_-+/()" else f"#{ord(c)};" for c in text)


def _svg(report: Report) -> str:
    """The picture, without Graphviz."""
    found = blocks(report.layers)
    shades = colours(report, found)
    return svg(found, _parts(report, found), lambda block: label(report, block), lambda block: colour_of(block, shades))


# ---- Graphviz


def _graphviz(report: Report) -> Any:
    """The graph as a `pydot.Dot`."""
    import pydot

    found = blocks(report.layers)
    shades = colours(report, found)
    font, ink = _quoted(FONT), _quoted(INK)
    graph: Any = pydot.Dot("fxzip", graph_type="digraph", ranksep="0.28", nodesep="0.25", fontname=font)
    box: dict[str, Any] = {"shape": "box", "style": _quoted("rounded,filled"), "margin": _quoted("0.14,0.06")}
    graph.set_node_defaults(**box, fontname=font, fontcolor=ink, fontsize="11")
    graph.set_edge_defaults(color=_quoted(PLAIN.stroke), arrowsize="0.7")
    frame: dict[str, Any] = {"style": "rounded", "color": _quoted(PLAIN.stroke), "margin": "12", "labeljust": "l"}
    for number, (title, members) in enumerate(_parts(report, found)):
        text = _quoted(title)
        part = pydot.Cluster(f"part{number}", label=text, fontname=font, fontcolor=ink, fontsize="12", **frame)
        for i in members:
            colour = colour_of(found[i], shades)
            text = "\\n".join(_quoted(line)[1:-1] for line in label(report, found[i]))
            tint, stroke = _quoted(colour.tint), _quoted(colour.stroke)
            part.add_node(pydot.Node(f"n{i}", label=f'"{text}"', fillcolor=tint, color=stroke))
        graph.add_subgraph(part)
    for i, block in enumerate(found):
        for source in block.inputs:
            graph.add_edge(pydot.Edge(f"n{source}", f"n{i}"))
    return graph


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _run(graph: Any, kind: str) -> bytes:
    try:
        picture = graph.create(format=kind)
    except (OSError, AssertionError) as error:  # pydot asserts that dot's exit status is 0
        raise SaveError(f"Graphviz could not draw the network: {error}") from error
    return bytes(picture)

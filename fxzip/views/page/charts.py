"""The page's charts: matplotlib figures as inline SVG, with text that stays text."""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fxzip.report import Report
from fxzip.views.page.facts import Facts
from fxzip.views.style import INK, PALETTE, PLAIN, colour_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fxzip.sweep import Sweep

MOST_SCORES = 4
WIDTH = 3.55
"""Inches, at 96 pixels each: a phone's width, so that text never shrinks there."""

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fxzip",
    "text.parse_math": False,
    "font.size": 10,
    "axes.edgecolor": "#4b5563",
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
}


@dataclass(frozen=True)
class Chart:
    """A figure: its title, the SVG, and what it shows in words."""

    title: str
    svg: Any
    text: str


def charts_of(report: Report, facts: Facts, sweep: Sweep | None) -> list[Chart]:
    """The charts that a report has data for."""
    from matplotlib import rc_context

    with rc_context(_STYLE):
        found = [_correlation(report, facts), _fidelity(report), _operations(report, facts), _sweep(sweep)]
    return [chart for chart in found if chart is not None]


def spans(report: Report) -> dict[str, tuple[int, int]]:
    """The first and the last layer (from 1, in the order of execution) of the trunk that gives each space."""
    found: dict[str, tuple[int, int]] = {}
    for depth, row in enumerate((r for r in report.layers if r.layer and not r.part), start=1):
        for name in row.spaces:
            found[name] = (found.get(name, (depth, depth))[0], depth)
    return found


def _correlation(report: Report, facts: Facts) -> Chart | None:
    """Matched correlation by depth (the figure of arXiv 2305.03053), and below it the share within a model."""
    depth = spans(report)
    rows = [r for r in report.spaces if r.correlation is not None and math.isfinite(r.correlation) and r.name in depth]
    if not rows:
        return None
    figure = _figure(3.4)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for row in rows:
        first, last = depth[row.name]
        colour = facts.colours[row.name].stroke
        upper.plot([first, last], [row.correlation] * 2, color=colour, linewidth=2, alpha=0.6, solid_capstyle="round")
        upper.plot([last], [row.correlation], "o", color=colour, markersize=5)
        lower.plot([first, last], [100 * row.within] * 2, color=colour, linewidth=2, alpha=0.6, solid_capstyle="round")
        lower.plot([last], [100 * row.within], "o", color=colour, markersize=4)
    values = [row.correlation for row in rows if row.correlation is not None]
    upper.set_ylim(min(0.0, min(values) - 0.05), 1.02)
    upper.set_ylabel("correlation")
    lower.set_ylim(-2, max(10.0, *(110 * row.within for row in rows)))
    lower.set_ylabel("within, %")
    lower.set_xlabel("layer of the trunk")
    lower.xaxis.get_major_locator().set_params(integer=True)
    text = (
        f"Mean correlation of the matched channels of {len(rows)} spaces, {min(values):.2f} to {max(values):.2f}: "
        "a line from the first to the last layer that gives the space, a dot where it was observed last. Below, the "
        "share of matches that lie within one model; all others are across the models."
    )
    return Chart("Matched correlation by depth", _svg(figure, "correlation"), text)


def _fidelity(report: Report) -> Chart | None:
    """What is left unexplained of each parent's features, by depth."""
    found = report.fidelity
    if found is None or len(found.depths) < 2:
        return None
    figure = _figure(2.4)
    axes: Any = figure.subplots()
    for model, task in enumerate(report.names):
        shares = [100 * depth.unexplained[model] for depth in found.depths]
        axes.plot(
            range(1, len(shares) + 1), shares, marker="o", markersize=4, color=PALETTE[model % len(PALETTE)].stroke
        )
        axes.annotate(_short(task), (len(shares), shares[-1]), (4, 0), textcoords="offset points", va="center")
    axes.set_ylim(0, 110 * max(max(depth.unexplained) for depth in found.depths) or 1)
    axes.set_ylabel("unexplained, %")
    axes.set_xlabel("merge point")
    axes.xaxis.get_major_locator().set_params(integer=True)
    text = (
        f"What the trunk does not tell of each model's own features, at each of the {len(found.depths)} merge points "
        f"in the order of execution, on {found.images:,} images that the fit did not see: where it climbs, merging "
        "loses."
    )
    return Chart("What is lost by depth", _svg(figure, "fidelity"), text)


def _operations(report: Report, facts: Facts) -> Chart | None:
    """Where the operations are: a bar for each block of the trunk and the heads."""
    shown = [block for block in facts.blocks if block.flops]
    if not shown:
        return None
    figure = _figure(max(1.6, 0.6 + 0.2 * len(shown)))
    axes = figure.subplots()
    for place, block in enumerate(shown):
        colour = colour_of(block, facts.colours) if not block.part else PLAIN
        axes.barh(place, block.flops, color=colour.tint, edgecolor=colour.stroke, linewidth=1)
    names = [f"{block.name} ({block.part})" if block.part else block.name for block in shown]
    axes.set_yticks(range(len(shown)), [_short(name) for name in names])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    _in_units(axes, max(block.flops for block in shown))
    heads = sum(cost.flops for cost in report.heads)
    total = report.flops_after or 1
    text = (
        f"Operations of each block on one example. The trunk has {100 * report.trunk.flops / total:.0f}% of them, "
        f"the heads have {100 * heads / total:.0f}%."
    )
    return Chart("Where the operations are", _svg(figure, "operations"), text)


def _sweep(sweep: Sweep | None) -> Chart | None:
    """Each score over the cost of the merges, a line for each method."""
    names = list(sweep.rows[0].scores)[:MOST_SCORES] if sweep and sweep.rows else []
    if sweep is None or not names:
        return None
    figure = _figure(2.3 * len(names))
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    methods = dict.fromkeys(row.method for row in sweep.rows)
    for axes, name in zip(panels, names, strict=True):
        for number, method in enumerate(methods):
            points = sorted((row.flops, row.scores[name]) for row in sweep.rows if row.method == method)
            style = {"color": PALETTE[number % len(PALETTE)].stroke, "marker": "osD^v"[number % 5], "markersize": 5}
            axes.plot(*zip(*points, strict=True), label=method, **style)
        axes.set_ylabel(name)
    panels[0].legend(frameon=False)
    panels[-1].set_xlabel("FLOPs, in networks")
    text = f"{' and '.join(names)} over the operations of trunk and heads, of {len(sweep.rows)} merges."
    return Chart("Scores over operations", _svg(figure, "sweep"), text)


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def _in_units(axes: Axes, most: float) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    scale, unit = next(
        (s, u) for s, u in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, "")) if most >= s or s == 1
    )
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / scale:g}"))
    axes.set_xlabel(f"{unit}FLOPs on one example")
    axes.set_xlim(left=0)


def _short(name: str, most: int = 22) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"


def _svg(figure: Figure, name: str) -> Any:
    """The figure as SVG to stand in HTML: no prolog, no metadata, ids of its own."""
    from markupsafe import Markup

    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    return Markup(text)  # matplotlib has escaped it
